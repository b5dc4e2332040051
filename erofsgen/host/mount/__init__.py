"""Mounts: the kernel's EROFS over the host cache, overlays on top, and what is mounted where."""

"""Containers in the foreground: a mounted image, an OCI runtime bundle, and somebody else's OCI runtime."""

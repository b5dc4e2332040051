"""Profiles: which chunks of an image a command touches first, and in what order."""

"""The host: cache and mounts."""

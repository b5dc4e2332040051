"""The host: cache, fill engine, mounts, and the daemon that makes mounts lazy."""

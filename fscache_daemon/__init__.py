"""The fscache plane: the kernel's cachefiles in on-demand mode asks for what it does not have."""

"""Images over FUSE, with pyfuse3: straight from the index, or their packs as flat files below the kernel's EROFS."""

"""The EROFS on-disk format: structures, writer, reader, checker. Pure: bytes in, bytes out."""

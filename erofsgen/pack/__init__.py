"""Packs: chunking, frames, table of contents, dictionary. Pure but for the files it is given."""

"""The pipeline: image to tree to chunks to packs and index to manifest."""

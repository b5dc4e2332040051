"""The fill engine: a range of a pack in, verified bytes in a target out."""

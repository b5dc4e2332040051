"""The host cache: indexes and packs on this host, what of them is there, and room for them."""

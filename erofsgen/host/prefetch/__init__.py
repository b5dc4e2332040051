"""Prefetch: what a start will want, brought before it asks."""

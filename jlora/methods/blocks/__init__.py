"""Deltas that are tables of blocks: shared, circulant, or of low rank each."""

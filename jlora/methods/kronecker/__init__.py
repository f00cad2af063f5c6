"""Deltas that are Kronecker products."""

"""Merges in the singular bases of the deltas, computed in their common core space."""

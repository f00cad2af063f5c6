"""Deltas that are computed from the weight itself."""

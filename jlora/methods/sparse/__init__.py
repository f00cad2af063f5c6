"""Deltas with few entries, in the weight itself or in a transform of it."""

"""Deltas that are products of thin factors."""

"""Merges whose coefficients are learned from data."""

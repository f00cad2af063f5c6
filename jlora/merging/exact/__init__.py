"""Merges without interference handling: concatenation, truncation, spherical averages."""

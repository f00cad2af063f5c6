"""Generators: an adapter from a condition by a learned distribution over adapters."""

"""Measurements of generated adapters: novelty, diversity, confusion, errors of deltas."""

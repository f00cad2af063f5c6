"""Measurements of a function at its sites, which initialisations and rank allocation start from."""

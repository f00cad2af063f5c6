"""Adapters as token sequences: canonical factors, site tokens, normalisation."""

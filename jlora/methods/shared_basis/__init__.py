"""Deltas on bases that all sites share or a seed gives."""

"""Orthogonal transformations of the weight."""

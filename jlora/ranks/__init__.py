"""Ranks: how many dimensions an adapter keeps, and when it loses them."""

"""Merges of the elements of the deltas: trimming, sign election, random dropping."""

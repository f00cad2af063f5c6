"""Spherical (Karcher) mean of eight adapters against the tuned mean."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="karcher",
    systems=("karcher",),
    method="karcher",
    reference="Goddard 2024, 2403.13257 (mergekit): keeps what averaging loses",
)

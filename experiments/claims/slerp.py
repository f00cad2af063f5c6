"""Spherical interpolation of two adapters against their tuned mean."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="slerp",
    systems=("slerp",),
    method="slerp",
    reference="Goddard 2024, 2403.13257 (mergekit): keeps what averaging loses",
    kind="pairs",
)

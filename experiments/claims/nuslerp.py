"""Spherical interpolation of whole kernels against the tuned mean."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="nuslerp",
    systems=("nuslerp",),
    method="nuslerp",
    reference="Goddard 2024, 2403.13257 (mergekit): keeps what averaging loses",
    kind="pairs",
)

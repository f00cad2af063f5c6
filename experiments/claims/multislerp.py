"""Spherical mean of eight adapters in one tangent step against the tuned mean."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="multislerp",
    systems=("multislerp",),
    method="multislerp",
    reference="Goddard 2024, 2403.13257 (mergekit): keeps what averaging loses",
)

"""Iso-C: one singular value for all directions of the sum, against the tuned sum."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="iso_c",
    systems=("iso_c",),
    method="iso_c",
    reference="Marczak 2025, 2502.04959: better than task arithmetic",
)

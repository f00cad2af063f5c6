"""DARE before a sum: 80 % of the entries dropped, the rest rescaled; no worse than the sum."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="dare_linear",
    systems=("dare_linear",),
    method="dare_linear",
    reference="Yu 2023, 2311.03099: entries can be dropped without loss, and merging gains",
    options={"density": 0.2},
)

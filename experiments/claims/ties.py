"""TIES: trimmed, elected signs, disjoint mean, against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="ties",
    systems=("ties",),
    method="ties",
    reference="Yadav 2023, 2306.01708: better than task arithmetic",
    options={"density": 0.2},
)

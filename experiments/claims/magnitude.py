"""Trimming alone (the first step of TIES) against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="magnitude",
    systems=("magnitude",),
    method="magnitude",
    reference="Yadav 2023, 2306.01708: trimming reduces interference",
    options={"density": 0.2},
)

"""DELLA: drops by magnitude, elects signs, against DARE with TIES."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="della",
    systems=("della",),
    method="della",
    reference="Deep 2024, 2406.11617: better than DARE and TIES",
    options={"density": 0.5, "epsilon": 0.15},
    baseline="dare_ties",
    baseline_options={"density": 0.2},
)

"""DELLA's drop by magnitude before a sum against DARE's drop by chance."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="della_linear",
    systems=("della_linear",),
    method="della_linear",
    reference="Deep 2024, 2406.11617: better than DARE",
    options={"density": 0.5, "epsilon": 0.15},
    baseline="dare_linear",
    baseline_options={"density": 0.2},
)

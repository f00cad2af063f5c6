"""Core space: TIES on aligned cores against TIES on the deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="core_space",
    systems=("core_space",),
    method="core_space",
    reference="Panariello 2025: better than merging in the full space",
    options={"rule": "ties", "density": 0.2},
    baseline="ties",
    baseline_options={"density": 0.2},
)

"""Consensus merging: entries that at least two tasks need, against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="consensus",
    systems=("consensus",),
    method="consensus",
    reference="Wang 2024, 2405.07813: better than task arithmetic",
    options={"sharpness": 0.4, "least": 2},
)

"""PEFT's magnitude_prune of deltas, at a rank, loses at most 0.1 points to the full merge."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_magnitude_prune_svd",
    systems=("peft_magnitude_prune_svd",),
    method="peft_magnitude_prune_svd",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type magnitude_prune_svd",
    options={"density": 0.2},
    baseline="magnitude",
    baseline_options={"density": 0.2},
    margin=-0.001,
)

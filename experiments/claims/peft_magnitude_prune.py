"""PEFT's magnitude_prune of factors loses at most 0.1 points to the merge of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_magnitude_prune",
    systems=("peft_magnitude_prune",),
    method="peft_magnitude_prune",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type magnitude_prune",
    options={"density": 0.2},
    baseline="magnitude",
    baseline_options={"density": 0.2},
    margin=-0.001,
)

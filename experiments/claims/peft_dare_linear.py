"""PEFT's dare_linear of factors loses at most 0.1 points to the merge of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_dare_linear",
    systems=("peft_dare_linear",),
    method="peft_dare_linear",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type dare_linear",
    options={"density": 0.2},
    baseline="dare_linear",
    baseline_options={"density": 0.2},
    margin=-0.001,
)

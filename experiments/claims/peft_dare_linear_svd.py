"""PEFT's dare_linear of deltas, at a rank, loses at most 0.1 points to the full merge."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_dare_linear_svd",
    systems=("peft_dare_linear_svd",),
    method="peft_dare_linear_svd",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type dare_linear_svd",
    options={"density": 0.2},
    baseline="dare_linear",
    baseline_options={"density": 0.2},
    margin=-0.001,
)

"""PEFT's dare_ties of factors loses at most 0.1 points to the merge of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_dare_ties",
    systems=("peft_dare_ties",),
    method="peft_dare_ties",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type dare_ties",
    options={"density": 0.2},
    baseline="dare_ties",
    baseline_options={"density": 0.2},
    margin=-0.001,
)

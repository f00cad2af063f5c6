"""PEFT's linear combination (of factors) loses at most 0.1 points to the exact sum."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_linear",
    systems=("peft_linear",),
    method="peft_linear",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type linear stands for the weighted sum",
    margin=-0.001,
)

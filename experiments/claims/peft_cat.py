"""PEFT's concatenation is the exact sum."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_cat",
    systems=("peft_cat",),
    method="peft_cat",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type cat is the weighted sum",
    margin=-0.001,
)

"""Concatenation of factors (the exact sum) against PEFT's mean of factors."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="concat",
    systems=("concat",),
    method="concat",
    reference="Prabhakar 2024, 2410.13025; Wang 2024, 2409.05976: better than averaging factors",
    baseline="peft_linear",
)

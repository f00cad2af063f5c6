"""PEFT's default: the sum cut to the rank of its adapters, against the exact cut."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="peft_svd",
    systems=("peft_svd",),
    method="peft_svd",
    reference="Mangrulkar 2022, PEFT 0.21.2: combination_type svd is the truncated sum",
    baseline="truncated",
    baseline_options={"rank": 4},
    margin=-0.001,
)

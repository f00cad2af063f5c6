"""LoRA-LEGO: clustered rank-one units against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="lego",
    systems=("lego",),
    method="lego",
    reference="Zhao 2024, 2409.16167: better than task arithmetic",
)

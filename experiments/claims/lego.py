"""LoRA-LEGO: clustered rank-one units against the plain average of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="lego",
    systems=("lego", "lego_spectral"),
    method="lego",
    baseline="task_arithmetic",
    reference="Zhao 2024, 2409.16167: better than task arithmetic",
)

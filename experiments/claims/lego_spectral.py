"""LoRA-LEGO on singular vectors as units against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="lego_spectral",
    systems=("lego_spectral",),
    method="lego_spectral",
    reference="Zhao 2024, 2409.16167: better than task arithmetic",
)

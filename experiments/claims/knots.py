"""KnOTS: TIES in the space of a joint SVD against TIES on the deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="knots",
    systems=("knots",),
    method="knots",
    reference="Stoica 2024, 2410.19735: better than TIES for LoRA",
    options={"rule": "ties", "density": 0.2},
    baseline="ties",
    baseline_options={"density": 0.2},
)

"""SCE: select, calculate, erase, against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="sce",
    systems=("sce",),
    method="sce",
    reference="Wan 2024, 2408.07990: better than task arithmetic",
    options={"density": 0.1},
)

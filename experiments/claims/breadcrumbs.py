"""Model Breadcrumbs: outliers and small entries masked, against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="breadcrumbs",
    systems=("breadcrumbs",),
    method="breadcrumbs",
    reference="Davari 2023, 2312.06795: better than task arithmetic",
    options={"density": 0.85, "gamma": 0.01},
)

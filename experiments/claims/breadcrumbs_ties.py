"""Breadcrumbs' masks before a sign election against TIES."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="breadcrumbs_ties",
    systems=("breadcrumbs_ties",),
    method="breadcrumbs_ties",
    reference="Davari 2023, 2312.06795 and mergekit: masks from both ends beat trimming",
    options={"density": 0.85, "gamma": 0.01},
    baseline="ties",
    baseline_options={"density": 0.2},
)

"""DARE before TIES against TIES alone."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="dare_ties",
    systems=("dare_ties",),
    method="dare_ties",
    reference="Yu 2023, 2311.03099: a plug-in that improves merging methods",
    options={"density": 0.2},
    baseline="ties",
    baseline_options={"density": 0.2},
)

"""TSV-M: decorrelated singular vectors of tasks against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="tsv",
    systems=("tsv",),
    method="tsv",
    reference="Gargiulo 2025, 2412.00081: better than task arithmetic",
)

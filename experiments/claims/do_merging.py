"""DO-Merging: decoupled, orthogonalised merging against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="do_merging",
    systems=("do_merging",),
    method="do_merging",
    reference="Zheng 2025, 2505.15875: better than task arithmetic",
)

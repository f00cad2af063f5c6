"""DO-Merging: decoupled, orthogonalised merging against the plain average of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="do_merging",
    systems=("do_merging", "do_decoupled"),
    method="do_merging",
    baseline="task_arithmetic",
    reference="Zheng 2025, 2505.15875: better than task arithmetic",
)

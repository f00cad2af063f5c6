"""RobustMerge: pruned and rescaled factors against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="robust_merge",
    systems=("robust_merge",),
    method="robust_merge",
    reference="Zeng 2025, 2502.17159: better than task arithmetic for parameter-efficient modules",
    options={"density": 0.2},
)

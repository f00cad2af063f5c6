"""WUDI: least interference found by descent, against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="wudi",
    systems=("wudi",),
    method="wudi",
    reference="Cheng 2025, 2503.08099: better than task arithmetic",
)

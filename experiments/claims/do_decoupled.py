"""DO-Merging without its descent: directions and magnitudes merged apart."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="do_decoupled",
    systems=("do_decoupled",),
    method="do_decoupled",
    reference="Zheng 2025, 2505.15875: decoupling alone is better than task arithmetic",
)

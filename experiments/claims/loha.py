"""LoHa: a product of two deltas, of rank r squared, is as good as LoRA of equal size."""

from experiments.claims import text_methods as lib
from jlora.methods import LoHa

CLAIM = lib.claim(
    name="loha",
    systems=("LoHa",),
    recipe=lib.on_attention("LoHa of rank 2", LoHa(rank=2, alpha=2.0), 1e-2),
    baseline=lib.lora(4),
    reference="Hyeon-Woo 2022, 2108.06098: as good as low rank at equal size, at a rank squared",
    margin=-0.01,
    parameters="at equal parameter count",
)

"""GraLoRA: blocks with an adapter each are better than LoRA of equal size."""

from experiments.claims import text_methods as lib
from jlora.methods import GraLoRA

CLAIM = lib.claim(
    name="gralora",
    systems=("GraLoRA",),
    recipe=lib.on_attention("GraLoRA of rank 4 in 2 x 2 blocks", GraLoRA(rank=4, alpha=4.0), 8e-3),
    baseline=lib.lora(4),
    reference="Jung 2025, 2505.20355: better than LoRA at the same size",
    parameters="at equal parameter count",
)

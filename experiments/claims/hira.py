"""HiRA: a high-rank update led by the weight is better than LoRA at equal parameter count."""

from experiments.claims import text_methods as lib
from jlora.methods import HiRA

CLAIM = lib.claim(
    name="hira",
    systems=("HiRA",),
    recipe=lib.on_attention("HiRA of rank 4", HiRA(rank=4), 3e-2),
    baseline=lib.lora(4),
    reference="Huang 2025, ICLR: better than LoRA at the same rank",
    parameters="at equal parameter count",
)

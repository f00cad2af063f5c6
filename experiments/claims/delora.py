"""DeLoRA: a delta of bounded size is as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import DeLoRA

CLAIM = lib.claim(
    name="delora",
    systems=("DeLoRA",),
    recipe=lib.on_attention("DeLoRA of rank 4", DeLoRA(rank=4), 8e-3),
    baseline=lib.lora(4),
    reference="Bini 2025, 2503.18225: LoRA's accuracy with a bounded delta",
    margin=-0.01,
    parameters="at equal parameter count",
)

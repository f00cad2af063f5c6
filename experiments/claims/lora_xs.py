"""LoRA-XS: a small core between the weight's own directions is as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import LoRAXS

CLAIM = lib.claim(
    name="lora_xs",
    systems=("LoRAXS",),
    recipe=lib.on_attention("LoRA-XS of rank 16", LoRAXS(rank=16, alpha=16.0), 8e-3),
    baseline=lib.lora(4),
    reference="Bałazy 2024, 2405.17604: LoRA's accuracy at a small part of its numbers",
    margin=-0.01,
    parameters="at 1/12 of the trained numbers",
)

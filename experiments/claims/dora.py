"""DoRA: magnitude and direction apart learn better than LoRA at the same rank."""

from experiments.claims import text_methods as lib
from jlora.methods import DoRA

CLAIM = lib.claim(
    name="dora",
    systems=("DoRA",),
    recipe=lib.on_attention("DoRA of rank 4", DoRA(rank=4, alpha=4.0), 8e-3),
    baseline=lib.lora(4),
    reference="Liu 2024, 2402.09353: better than LoRA at the same rank",
    parameters="at 9/8 of the trained numbers",
)

"""ALLoRA: without alpha and dropout, better than LoRA with either, in few steps."""

import math

import jlora as jl
from experiments.claims import text_methods as lib
from jlora.methods import ALLoRA

CLAIM = lib.claim(
    name="allora",
    systems=("ALLoRA",),
    recipe=lib.on_attention("ALLoRA of rank 4", ALLoRA(rank=4, eta=math.sqrt(2.0)), 8e-3),
    baseline=lib.lora(4),
    reference="Huang 2024, 2410.09692: better than LoRA in short training",
    others=(
        lib.on_attention("ALLoRA of rank 4, eta 2", ALLoRA(rank=4, eta=2.0), 8e-3),
        lib.on_attention("LoRA of rank 4, alpha 16", jl.LoRA(rank=4, alpha=16.0), 8e-3),
    ),
    parameters="at equal parameter count",
)

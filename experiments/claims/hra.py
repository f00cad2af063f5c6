"""HRA: a chain of Householder reflections is as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import HRA

CLAIM = lib.claim(
    name="hra",
    systems=("HRA",),
    recipe=lib.on_attention("HRA of 8 reflections", HRA(rank=8), 1e-2),
    baseline=lib.lora(4),
    reference="Yuan 2024, 2405.17484: as good as LoRA at equal size",
    margin=-0.01,
    parameters="at equal parameter count",
)

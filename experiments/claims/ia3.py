"""IA3: one factor per feature is as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import IA3

CLAIM = lib.claim(
    name="ia3",
    systems=("IA3",),
    recipe=lib.on_attention("IA3", IA3(), 3e-2),
    baseline=lib.lora(4),
    reference="Liu 2022, 2205.05638: better than LoRA on few examples, at fewer numbers",
    margin=-0.01,
    parameters="at 1/8 of the trained numbers",
)

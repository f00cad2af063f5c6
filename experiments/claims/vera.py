"""VeRA: two vectors per site on shared random bases are as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import VeRA

CLAIM = lib.claim(
    name="vera",
    systems=("VeRA",),
    recipe=lib.on_attention("VeRA of rank 256", VeRA(rank=256), 2e-2),
    baseline=lib.lora(4),
    reference="Kopiczko 2024, 2310.11454: LoRA's performance at a tenth of its numbers",
    margin=-0.01,
    parameters="at 1/5 of the trained numbers",
)

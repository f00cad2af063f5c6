"""FlyLoRA: a frozen sparse projection that routes is as good as LoRA at half its numbers."""

from experiments.claims import routed_text as lib
from jlora.methods import FlyLoRA

CLAIM = lib.claim(
    name="flylora",
    systems=("FlyLoRA",),
    recipe=lib.Recipe("FlyLoRA, 8 of 32 ranks", FlyLoRA(32, 8, alpha=64.0), 8e-3),
    baseline=lib.lora(32),
    reference="Zou 2025, 2510.08396: better than LoRA of the same rank",
    parameters="at half the trained numbers",
    others=(lib.lora(16),),
)

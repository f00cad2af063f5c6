"""RoAd: rotations of pairs of outputs are as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import RoAd

CLAIM = lib.claim(
    name="road",
    systems=("RoAd",),
    recipe=lib.on_attention("RoAd", RoAd(group=64), 2e-2),
    baseline=lib.lora(4),
    reference="Liao 2024, 2409.00119: LoRA's accuracy at a small part of its numbers",
    margin=-0.01,
    parameters="at 1/8 of the trained numbers",
)

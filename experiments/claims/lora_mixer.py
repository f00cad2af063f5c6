"""LoRA-Mixer: a router over frozen experts, with the entropy of either sign in its loss."""

import dataclasses

from experiments.claims import routed_text as lib
from jlora.methods import LoRAMixer

METHOD = LoRAMixer(8, 4, top_k=3, train_experts=False)
PRINTED = lib.Recipe(
    "LoRA-Mixer, entropy as printed", METHOD, 5e-3, 0.01, entropy=-0.01, zoo=True, regime="sparse"
)
SHARP = dataclasses.replace(PRINTED, name="LoRA-Mixer, entropy minimised", entropy=0.01)
ALONE = dataclasses.replace(PRINTED, name="LoRA-Mixer, balance loss alone", entropy=0.0)
CLAIM = lib.claim(
    name="lora_mixer",
    systems=("LoRAMixer",),
    recipe=PRINTED,
    baseline="single",
    reference="Li 2025, 2507.00029: better than single adapters, with experts that are frozen",
    others=(SHARP, ALONE, lib.lora(4)),
)

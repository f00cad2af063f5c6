"""VB-LoRA: factors mixed from one small bank of vectors are as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import VBLoRA

SITES = "layers/attention/(query|key|value|out)/kernel"  # one pattern, so one bank for all
BANK = VBLoRA(rank=4, num_vectors=32, vector_length=128)

CLAIM = lib.claim(
    name="vblora",
    systems=("VBLoRA",),
    recipe=lib.Recipe("VB-LoRA of 32 vectors", {SITES: BANK}, 1e-2),
    baseline=lib.lora(4),
    reference="Li 2024, 2405.15179: LoRA's performance from a shared bank",
    margin=-0.01,
    parameters="at 7/12 of the trained numbers",
)

"""Uni-LoRA: one vector of a tenth of LoRA's numbers is as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import UniLoRA, VeRA

SITES = "layers/attention/(query|key|value|out)/kernel"  # one pattern, so one vector for all

CLAIM = lib.claim(
    name="unilora",
    systems=("UniLoRA",),
    recipe=lib.Recipe("Uni-LoRA of 1228 numbers", {SITES: UniLoRA(rank=4, size=1228)}, 2e-2),
    baseline=lib.lora(4),
    reference="Li 2025, 2506.00799: parity with LoRA from one vector",
    margin=-0.01,
    others=(lib.on_attention("VeRA of rank 64", VeRA(rank=64), 2e-2),),
    parameters="at 1/10 of the trained numbers",
)

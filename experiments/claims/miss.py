"""MiSS: one matrix, repeated over shards of the inputs, converges faster than PiSSA and LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import MiSS

CLAIM = lib.claim(
    name="miss",
    systems=("MiSS",),
    recipe=lib.on_attention("MiSS of rank 8", MiSS(rank=8), 1e-3),
    baseline=lib.pissa(4),
    reference="Kang 2024, 2409.15371: lower loss in as many steps",
    metric="loss",
    others=(lib.lora(4),),
    parameters="at equal parameter count",
)

"""BAT: a change led by the weight converges faster than PiSSA and LoRA of equal size."""

from experiments.claims import text_methods as lib
from jlora.methods import BAT

CLAIM = lib.claim(
    name="bat",
    systems=("BAT",),
    recipe=lib.on_attention("BAT with blocks of 8", BAT(block=8), 1e-3),
    baseline=lib.pissa(4),
    reference="Kang 2024, 2409.15371v1: lower loss in as many steps",
    metric="loss",
    others=(lib.lora(4),),
    parameters="at equal parameter count",
)

"""C3A: circulant blocks are as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import C3A

CLAIM = lib.claim(
    name="c3a",
    systems=("C3A",),
    recipe=lib.on_attention("C3A with blocks of 48", C3A(block=48), 1e-3),
    baseline=lib.lora(4),
    reference="Chen 2024, 2407.19342: circular convolutions as good as LoRA",
    margin=-0.01,
    parameters="at equal parameter count",
)

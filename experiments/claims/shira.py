"""SHiRA: a sparse set of the weight's entries is as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import SHiRA

CLAIM = lib.claim(
    name="shira",
    systems=("SHiRA",),
    recipe=lib.on_attention("SHiRA of as many entries", SHiRA(rank=4), 3e-3),
    baseline=lib.lora(4),
    reference="Bhardwaj 2024, 2406.13175: a sparse high-rank adapter as good as LoRA",
    margin=-0.01,
    parameters="at equal parameter count",
)

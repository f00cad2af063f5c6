"""TeRA: diagonals in a random tensor network are as good as VeRA's vectors, and fewer."""

from experiments.claims import text_methods as lib
from jlora.methods import TeRA, VeRA

CLAIM = lib.claim(
    name="tera",
    systems=("TeRA",),
    recipe=lib.on_attention("TeRA of rank 16", TeRA(rank=16), 2e-2),
    baseline=lib.on_attention("VeRA of rank 64", VeRA(rank=64), 2e-2),
    reference="Gu 2025, 2509.03234: high rank at the numbers of vector-based methods",
    margin=-0.01,
    others=(lib.lora(4),),
    parameters="at 1/7 of the trained numbers",
)

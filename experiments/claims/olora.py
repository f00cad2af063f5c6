"""OLoRA: LoRA from orthonormal directions of the weights trains faster than from zero."""

import jlora as jl
from experiments.claims import text_starts as lib


def start(data, seed):
    """From the weights alone."""
    del seed
    return data.params, jl.inits.olora(data.fn, data.params, data.inputs, methods=lib.methods(8))


CLAIM = lib.claim(
    name="olora",
    systems=("OLoRA",),
    method=lib.Method("OLoRA of rank 8", start, 1e-3),
    rank=8,
    reference="Büyükakyüz 2024, 2406.01775: a lower training loss than LoRA at equally many steps",
)

"""PiSSA: LoRA from the principal part of the weights trains faster than from zero."""

import jlora as jl
from experiments.claims import text_starts as lib


def start(data, seed):
    """From the weights alone."""
    del seed
    return data.params, jl.inits.pissa(data.fn, data.params, data.inputs, methods=lib.methods(8))


CLAIM = lib.claim(
    name="pissa",
    systems=("PiSSA",),
    method=lib.Method("PiSSA of rank 8", start, 1e-3),
    rank=8,
    reference="Meng 2024, 2404.02948: a lower training loss than LoRA at equally many steps",
)

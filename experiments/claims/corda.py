"""CorDA: LoRA from what the data use most of the weights trains faster than from zero."""

import functools

import jlora as jl
from experiments.claims import text_starts as lib


def start(mode, data, seed):
    """From the weights and the inputs of training rows, padding left out."""
    del seed
    return data.params, jl.inits.corda(
        data.fn, data.params, data.inputs, methods=lib.methods(8), mode=mode, mask=lib.tokens
    )


CLAIM = lib.claim(
    name="corda",
    systems=("CorDA",),
    method=lib.Method("CorDA (ipm) of rank 8", functools.partial(start, "ipm"), 1e-3),
    rank=8,
    reference="Yang 2024, 2406.05223: instruction-previewed, faster than LoRA and PiSSA",
    others=(lib.Method("CorDA (kpm) of rank 8", functools.partial(start, "kpm"), 1e-3),),
)

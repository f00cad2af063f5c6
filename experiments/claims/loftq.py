"""LoftQ: on a 4-bit base, LoRA that starts at what quantising has lost is better than from zero."""

import jlora as jl
from experiments.claims import text_starts as lib


def start(data, seed):
    """Base in 4 bits, and what that has lost."""
    del seed
    args = (data.fn, data.params, data.inputs)
    return jl.inits.loftq(*args, methods=lib.methods(8), bits=4, block=64, iterations=5)


def plain(data, seed):
    """QLoRA: the same base in 4 bits, LoRA from zero."""
    base, _ = start(data, seed)
    return base, lib.fresh(data, 8, seed)


CLAIM = lib.claim(
    name="loftq",
    systems=("LoftQ",),
    method=lib.Method("LoftQ of rank 8 on 4 bits", start, 8e-3),
    rank=8,
    reference="Li 2023, 2310.08659: better than QLoRA",
    against=lib.Method("LoRA of rank 8 on 4 bits", plain, 8e-3),
)

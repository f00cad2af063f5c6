"""NLoRA: LoRA with a square matrix in its middle, from rows and columns of the weights."""

import functools

import jax

import jlora as jl
from experiments.claims import text_starts as lib


def start(middle, data, seed):
    """From the weights alone."""
    del seed
    args = (data.fn, data.params, data.inputs)
    return data.params, jl.inits.nlora(*args, methods=lib.methods(8), middle=middle)


def random(data, seed):
    """SLoRA: the same form from random factors."""
    args, key = (data.fn, data.params, data.inputs), jax.random.key(seed)
    return data.params, jl.inits.slora(*args, methods=lib.methods(8), key=key)


CLAIM = lib.claim(
    name="nlora",
    systems=("NLoRA",),
    method=lib.Method("NLoRA of rank 8", functools.partial(start, "raw"), 1e-3),
    rank=8,
    reference="Guo 2025, 2502.14482: a lower training loss than LoRA at equally many steps",
    others=(
        lib.Method("NLoRA of rank 8, pseudo-inverse", functools.partial(start, "pinv"), 1e-3),
        lib.Method("SLoRA of rank 8", random, 5e-3),
    ),
    parameters="with 64 numbers per site more",
)

"""EVA: LoRA from the directions of the inputs, with ranks by explained variance."""

import functools

import jax
import jax.numpy as jnp

import jlora as jl
from experiments.claims import text_starts as lib


def start(rho, data, seed):
    """From the inputs of training rows, padding left out, as LoRA of one rank with dead columns."""
    del seed
    args = (data.fn, data.params, data.inputs)
    found = jl.inits.eva(*args, methods=lib.methods(8), rho=rho, mask=lib.tokens)
    return data.params, lib.padded(found, data, round(8 * rho))


def orthogonal(data, seed):
    """Random orthonormal directions in place of those of the inputs."""
    plain = lib.fresh(data, 8)
    trainable = {}
    for number, (path, t) in enumerate(sorted(plain.trainable.items())):
        key = jax.random.fold_in(jax.random.key(seed), number)
        a = jnp.linalg.qr(jax.random.normal(key, t["a"].shape))[0]
        trainable[path] = {**t, "a": a}
    return data.params, plain.replace(trainable=trainable)


CLAIM = lib.claim(
    name="eva",
    systems=("EVA",),
    method=lib.Method("EVA of rank 8", functools.partial(start, 2.0), 8e-3),
    rank=8,
    reference="Paischer 2024, 2410.07170: a lower training loss than LoRA at equally many steps",
    others=(
        lib.Method("EVA of rank 8, ranks as they are", functools.partial(start, 1.0), 8e-3),
        lib.Method("LoRA of rank 8 from random orthonormal a", orthogonal, 8e-3),
    ),
    parameters="at an equal sum of ranks",
)

"""Initialisations of LoRA as variants: from the weights, or from batches of training rows.

A start of a task is made once per seed, from the same rows for every learning rate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.variant_study.bench import Bench
from jlora.types import Batch, Dynamic, Tree

BATCHES, ROWS = 8, 16  # of the training rows that a start is made from
Methods = dict[str, jl.LoRA]


class Data(NamedTuple):
    """What the start of one task is made from."""

    fn: Callable[..., Dynamic]  # (params, *inputs) -> logits
    loss: Callable[..., Dynamic]  # (params, *inputs, label) -> scalar
    params: Tree  # of the base
    inputs: Sequence[Batch]  # batches of fn
    labelled: Sequence[Batch]  # the same with labels, batches of loss
    padding: Callable[..., Dynamic] | None  # batch -> one flag per token, false where it is none


Start = Callable[[Data, Methods], jl.Adapter]


def data(bench: Bench, task: int, seed: int) -> Data:
    """Batches of training rows of a task.

    Args:
      bench: model and rows.
      task: its number.
      seed: of the draw.
    """
    draw, count = np.random.default_rng([seed, task]), bench.sizes["train"]
    order = np.resize(draw.permutation(count), BATCHES * ROWS).reshape(BATCHES, ROWS)
    picked = [bench.pick(bench.data, "train", task, jnp.asarray(rows, jnp.int32)) for rows in order]
    return Data(bench.apply, _loss(bench.apply), bench.base, [p[0] for p in picked],
                [(*inputs, label) for inputs, label in picked], bench.padding)  # fmt: skip


@functools.cache
def _loss(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """One function object, so that what is compiled for one task serves the others."""

    def loss(params: Tree, *batch: Dynamic) -> jax.Array:
        *inputs, label = batch
        logits = apply(params, *inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    return loss


def olora(data: Data, methods: Methods) -> jl.Adapter:
    """From orthonormal directions of the weights."""
    return jl.inits.olora(data.fn, data.params, data.inputs, methods=methods)


def nlora(data: Data, methods: Methods) -> jl.Adapter:
    """From rows and columns of the weights, with a square matrix in the middle."""
    return jl.inits.nlora(data.fn, data.params, data.inputs, methods=methods)


def eva(data: Data, methods: Methods) -> jl.Adapter:
    """From the directions of the inputs, every rank as it is."""
    args = data.fn, data.params, data.inputs
    return jl.inits.eva(*args, methods=methods, rho=1.0, mask=data.padding)


def corda(data: Data, methods: Methods) -> jl.Adapter:
    """From what the inputs use most of the weights."""
    args = data.fn, data.params, data.inputs
    return jl.inits.corda(*args, methods=methods, mask=data.padding)


def lora_ga(data: Data, methods: Methods) -> jl.Adapter:
    """From the directions of the gradient."""
    return jl.inits.lora_ga(data.loss, data.params, data.labelled, methods=methods)


def lora_sb(data: Data, methods: Methods) -> jl.Adapter:
    """A core between frozen factors, from the first step of full fine-tuning."""
    return jl.inits.lora_sb(data.loss, data.params, data.labelled, methods=methods, step=1e-4)

r"""The last layer of the base, taken apart at the matrix that a discriminant adapts.

========  ================================================================
f_t       what enters the output matrix of the feed-forward part, [t, m]
v_t       what leaves it with bias and residual, before the norm, [t, d]
a, b      factors of an adapter of that matrix, [m, r], [r, d]
========  ================================================================

.. math:: \mathrm{logits} = \mathrm{scale} \cdot H\, \mathrm{pool}(\mathrm{LN}(v + s\, f a b))

f and v are the same for every adapter of that matrix, so that many are tried at the cost of a norm.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages.world import World, existing
from jlora.models import encoder, layers

PyTree = Any


class Activations(NamedTuple):
    """Of one batch of texts."""

    inner: jax.Array  # [n, t, m] f
    outer: jax.Array  # [n, t, d] v
    mask: jax.Array  # [n, t] bool


@functools.partial(jax.jit, static_argnums=0)
def _activations(
    model: encoder.EncoderConfig, upper: PyTree, hidden: jax.Array, mask: jax.Array
) -> Activations:
    depth = jax.tree.leaves(upper["layers"])[0].shape[0]
    if depth > 1:
        hidden = encoder.run(encoder.split(upper, depth - 1)[0], hidden, mask, model)
    last = jax.tree.map(lambda x: x[-1], upper["layers"])
    attention, ffn = encoder.Attention(model), encoder.FeedForward(model)
    u = cast(
        jax.Array,
        attention.apply({"params": last["attention"]}, hidden, layers.mask_bias(mask)),
    )
    _, kept = ffn.apply(
        {"params": last["ffn"]}, u, capture_intermediates=True, mutable=["intermediates"]
    )
    tables: Any = kept["intermediates"]
    (up,), (down,) = (tables[name]["__call__"] for name in ("up", "down"))
    return Activations(layers.gelu(up), u + down, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    model: encoder.EncoderConfig,
    scale: float,
    upper: PyTree,
    at: Activations,
    a: jax.Array,
    b: jax.Array,
    head: jax.Array,
) -> jax.Array:
    norm = jax.tree.map(lambda x: x[-1], upper["layers"]["ffn"]["norm"])
    moved = at.outer + (at.inner @ a) @ b
    out = cast(jax.Array, encoder.Norm(model).apply({"params": norm}, moved))
    logits = jnp.float32(scale) * encoder.mean_pool(out, at.mask) @ head.T
    return existing(logits, head[None])


def batches(world: World, index: np.ndarray) -> Iterator[tuple[Activations, int]]:
    """(activations, how many of their rows are no padding) of texts, `eval_rows` at a time."""
    size = world.config.eval_rows
    for start in range(0, len(index), size):
        part = index[start : start + size]
        rows = np.resize(part, size)
        activations = _activations(world.model, world.upper, world.hidden[rows], world.mask[rows])
        yield activations, len(part)


@jax.jit
def _pooled(at: Activations) -> jax.Array:
    weight = at.mask.astype(at.inner.dtype)
    return jnp.einsum("ntm,nt->nm", at.inner, weight) / weight.sum(1)[:, None]


def features(world: World, index: np.ndarray) -> np.ndarray:
    """[n, m] mean of f over the tokens of each text."""
    parts = [np.asarray(_pooled(at))[:real] for at, real in batches(world, index)]
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0)
def _embedded(model: encoder.EncoderConfig, upper: PyTree, at: Activations) -> jax.Array:
    norm = jax.tree.map(lambda x: x[-1], upper["layers"]["ffn"]["norm"])
    out = cast(jax.Array, encoder.Norm(model).apply({"params": norm}, at.outer))
    return encoder.mean_pool(out, at.mask)


def embeddings(world: World, index: np.ndarray) -> np.ndarray:
    """[n, d] what the base says of each text, of unit norm."""
    parts = [
        np.asarray(_embedded(world.model, world.upper, at))[:real]
        for at, real in batches(world, index)
    ]
    return np.concatenate(parts)


def pooled(
    model: encoder.EncoderConfig, upper: PyTree, hidden: jax.Array, mask: jax.Array
) -> jax.Array:
    """[n, m] mean of f over the tokens, as a function that can be lifted and differentiated."""
    return _pooled(_activations(model, upper, hidden, mask))


def answers(
    world: World, at: Activations, a: jax.Array, b: jax.Array, head: np.ndarray
) -> np.ndarray:
    """Class of each row of a batch [n] by the base with factors (a, b)."""
    given = (world.upper, at, a, b, jnp.asarray(head))
    return np.asarray(_logits(world.model, world.config.head_scale, *given).argmax(-1))

"""How good an adapter is: test predictions of a bank of adapters on one task.

An adapter is merged and the model runs as it is: one forward pass costs what the base costs. One
adapter at a time, because a batch of adapters has a weight each, so nothing is shared, and the
activations of several leave the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.stages import codec
from experiments.stages.codec import Encoded
from experiments.stages.world import World, classifier
from experiments.workdir import StageError
from jlora.generation.tokens.site_tokens import TokenSpec
from jlora.models import encoder

PyTree = Any


class Batch(NamedTuple):
    """Test rows of one task, padded to `eval_rows` so that all share one compilation."""

    hidden: jax.Array  # [rows, t, d] f32, states entering the adapted layers
    mask: jax.Array  # [rows, t] bool
    head: jax.Array  # [rows, C, d] f32, frozen class vectors
    label: jax.Array  # [rows] int32
    real: int  # how many of the rows are no padding


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _right(
    model: encoder.EncoderConfig,
    scale: float,
    spec: TokenSpec,
    upper: PyTree,
    template: jl.Adapter,
    tokens: jax.Array,
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """bool [rows]: which `rows` (hidden, mask, head, label) the adapter of `tokens` gets right."""
    hidden, mask, head, label = rows
    adapter = template.replace(trainable=codec.decode_tokens(spec, template, tokens))
    logits = classifier(model, scale)(jl.merge(upper, adapter), hidden, mask, head)
    return logits.argmax(-1) == label


def batches(world: World, task: str) -> Iterator[Batch]:
    """All test rows of a task: none is left out, however many a user's task has."""
    size = world.config.eval_rows
    rows = world.rows[task, "test"]
    head = jnp.broadcast_to(jnp.asarray(world.head_of(task)), (size, *world.heads.shape[1:]))
    for start in range(0, len(rows.label), size):
        index, label = rows.index[start : start + size], rows.label[start : start + size]
        real = len(label)
        index, label = np.resize(index, size), np.resize(label, size)
        yield Batch(world.hidden[index], world.mask[index], head, jnp.asarray(label), real)


def correct(world: World, encoded: Encoded, task: str, tokens: np.ndarray) -> np.ndarray:
    """Which test rows each adapter gets right: bool [m, rows].

    Args:
      tokens: [m, T, D] canonical tokens; all-zero tokens with a shared A are the base itself.

    Raises:
      StageError: an adapter with NaN or infinity, by its task.
    """
    if not np.isfinite(tokens).all():
        raise StageError(f"task '{task}': an adapter has NaN or infinity")
    parts = list(batches(world, task))
    static = world.model, world.config.head_scale, encoded.spec

    def hits(x: np.ndarray) -> np.ndarray:
        own = [_right(*static, world.upper, encoded.template, x, part[:4]) for part in parts]
        return np.concatenate([np.asarray(h)[: p.real] for h, p in zip(own, parts, strict=True)])

    return np.stack([hits(x) for x in tokens])


@functools.partial(jax.jit, static_argnums=0)
def _unpack(spec: TokenSpec, template: jl.Adapter, tokens: jax.Array) -> PyTree:
    return jax.vmap(lambda x: codec.decode_tokens(spec, template, x))(tokens)


def unpack(encoded: Encoded, tokens: jax.Array) -> PyTree:
    """Trainables [m, ...] of canonical tokens [m, T, D]."""
    return _unpack(encoded.spec, encoded.template, tokens)

"""How good an adapter is: test predictions of a bank of adapters on one task."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.stages import codec
from experiments.stages.codec import Coded
from experiments.stages.world import World, classifier

PyTree = Any
GROUP = 8  # adapters in one call


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(model, scale, upper, template, bank, hidden, mask, head, label):
    tuned = jl.lift(classifier(model, scale))

    def one(trainable):
        logits = tuned(upper, template.replace(trainable=trainable), hidden, mask, head)
        return logits.argmax(-1) == label

    return jax.vmap(one)(bank)


def test_rows(world: World, task: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, int]:
    """(hidden, mask, head, label) of a task's test rows padded to `eval_rows`, and their number."""
    size = world.config.eval_rows
    rows = world.rows[task, "test"]
    index, label = rows.index[:size], rows.label[:size]
    index, padded = np.resize(index, size), np.resize(label, size)
    head = jnp.broadcast_to(jnp.asarray(world.head_of(task)), (size, *world.heads.shape[1:]))
    return world.hidden[index], world.mask[index], head, jnp.asarray(padded), len(label)


def correct(world: World, coded: Coded, task: str, tokens: np.ndarray) -> np.ndarray:
    """Which test rows each adapter gets right: bool [m, rows].

    Args:
      tokens: [m, T, D] canonical tokens; all-zero tokens with a shared A are the base itself.
    """
    hidden, mask, head, label, real = test_rows(world, task)
    out = []
    for start in range(0, len(tokens), GROUP):
        part = tokens[start : start + GROUP]
        full = np.concatenate([part, np.repeat(part[-1:], GROUP - len(part), 0)])
        bank = unpack(coded, jnp.asarray(full))
        hit = _right(
            world.model, world.config.head_scale, world.upper, coded.template,
            bank, hidden, mask, head, label,
        )  # fmt: skip
        out.append(np.asarray(hit)[: len(part), :real])
    return np.concatenate(out)


def unpack(coded: Coded, tokens: jax.Array) -> PyTree:
    """Trainables [m, ...] of canonical tokens [m, T, D]."""
    return jax.vmap(lambda x: codec.to_trainable(coded, x))(tokens)

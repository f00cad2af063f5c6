r"""A task of more classes than the generator's conditions hold: an adapter per class.

========  ========================================================================
w_c, m_c  embeddings of the description and mean of the examples' embeddings, class c
l_c       logits of the base with the adapter of class c: of the class, and of the rest
========  ========================================================================

The generator is asked for C adapters of two classes, c against the rest, by

.. math:: \mathrm{condition}_c = \Big(w_c,\; m_c,\;
    \frac{1}{C - 1} \sum_{k \ne c} w_k,\; \frac{1}{C - 1} \sum_{k \ne c} m_k \Big), \qquad
    \hat y = \arg\max_c\, (l_{c, 0} - l_{c, 1}).

Reference: Rifkin and Klautau 2004 (one against all).
Deviates: margins of different adapters are compared as they are; none is calibrated.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.data.task import Task
from experiments.stages import accuracy, codec
from experiments.stages.codec import Encoded
from experiments.stages.world import World, classifier, condition
from experiments.workdir import StageError
from jlora.generation.tokens.site_tokens import TokenSpec
from jlora.models import encoder

PyTree = Any


def against_rest(parts: np.ndarray) -> np.ndarray:
    """[C, 2, ...]: each row of [C, ...], and the mean of the others."""
    rest = (parts.sum(0, keepdims=True) - parts) / np.float32(len(parts) - 1)
    return np.stack([parts, rest], 1)


def conditions(world: World, task: Task) -> np.ndarray:
    """[C, 4, E] conditions of each class against the rest, of all training texts of `world`."""
    raw = condition(world, task, None)
    pairs = against_rest(raw.reshape(task.classes, 2, -1))  # [C, 2, 2, E]
    return pairs.reshape(task.classes, 4, -1)


def heads(world: World, task: Task) -> np.ndarray:
    """[C, 2, d] class vectors of each class and the rest: those of any task of two classes."""
    own = world.head_of(task.name)[: task.classes]
    if world.config.head == "anonymous":
        return np.broadcast_to(own[None, :2], (task.classes, 2, own.shape[1]))
    return against_rest(own)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _margins(
    model: encoder.EncoderConfig,
    scale: float,
    spec: TokenSpec,
    upper: PyTree,
    template: jl.Adapter,
    tokens: jax.Array,
    rows: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """[rows] logit of class 0 less that of class 1 of `rows` (hidden, mask, head [2, d])."""
    hidden, mask, head = rows
    adapter = template.replace(trainable=codec.decode_tokens(spec, template, tokens))
    each = jnp.broadcast_to(head, (len(hidden), *head.shape))
    logits = classifier(model, scale)(jl.merge(upper, adapter), hidden, mask, each)
    return logits[:, 0] - logits[:, 1]


def correct(world: World, encoded: Encoded, task: str, tokens: np.ndarray) -> np.ndarray:
    """Which test rows each set of adapters gets right: bool [m, rows].

    Args:
      tokens: [m, C, T, D] canonical tokens, of each class against the rest.

    Raises:
      StageError: an adapter with NaN or infinity, by its task.
    """
    if not np.isfinite(tokens).all():
        raise StageError(f"task '{task}': an adapter has NaN or infinity")
    parts = list(accuracy.batches(world, task))
    static, own = (world.model, world.config.head_scale, encoded.spec), world.task(task)
    vectors = [jnp.asarray(head) for head in heads(world, own)]

    def margins(x: np.ndarray, head: jax.Array) -> np.ndarray:
        scores = [
            _margins(*static, world.upper, encoded.template, x, (part.hidden, part.mask, head))
            for part in parts
        ]
        return np.concatenate([np.asarray(t)[: p.real] for t, p in zip(scores, parts, strict=True)])

    label = np.concatenate([np.asarray(part.label)[: part.real] for part in parts])
    out = []
    for each in tokens:
        scores = [margins(x, head) for x, head in zip(each, vectors, strict=True)]
        out.append(np.stack(scores, 1).argmax(1) == label)
    return np.stack(out)

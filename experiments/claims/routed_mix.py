r"""The mixture of the claims of routed adapters: rows of eight text tasks, and the model.

==========  ==============================================================================
T           the eight tasks of the merging claims
n, m, k     training, validation and test rows of each, repeated to one number
N           texts; the states that enter the two adapted layers are computed once for each
==========  ==============================================================================
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import text_merges
from experiments.merging import cells, text
from experiments.stages import world as world_lib
from jlora.models import encoder

VALIDATION, TEST = 32, 64  # rows of a task


class Mix(NamedTuple):
    """Rows of all tasks, and the model."""

    apply: Callable[..., jax.Array]  # (params, hidden, mask, head) -> logits; hashable
    states: Callable[..., jax.Array]  # (params, hidden, mask, head) -> [b, t, d]; hashable
    base: Any  # parameters of the last layers
    names: tuple[str, ...]
    index: jax.Array  # [T, n] int32, training rows of a task, repeated to one number
    label: jax.Array  # [T, n] int32
    heads: jax.Array  # [T, 2, d]
    hidden: jax.Array  # [N, t, d], states of all texts that enter the layers
    mask: jax.Array  # [N, t] bool
    validation: tuple[jax.Array, jax.Array]  # index and label, [T, m] int32
    test: tuple[jax.Array, jax.Array]  # the same, [T, k]


@functools.cache
def mix(workdir: Path) -> Mix:
    """The eight tasks; the states are computed once per workdir."""
    world = world_lib.build(text.REAL, workdir, None)
    names = tuple(world.names("seen")[: text_merges.SIZE])

    def split(name: str, most: int) -> tuple[jax.Array, jax.Array]:
        rows = [world.rows[n, name] for n in names]
        index, label = (
            jnp.asarray(np.stack([np.resize(getattr(r, k), most) for r in rows]), jnp.int32)
            for k in ("index", "label")
        )
        return index, label

    most = max(len(world.rows[n, "train"].index) for n in names)
    heads = jnp.asarray(np.stack([world.head_of(n) for n in names]))
    return Mix(
        cells.text_classifier(world.model, world.config.head_scale), _states(world.model),
        world.upper, names, *split("train", most), heads, world.hidden, world.mask,
        split("validation", VALIDATION), split("test", TEST),
    )  # fmt: skip


@functools.cache
def _states(model: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    return lambda upper, hidden, mask, head: encoder.run(upper, hidden, mask, model)


def experts(found: Mix, seed: int, workdir: Path) -> list[jl.Adapter]:
    """The trained adapter of each task."""
    adapters = text_merges.bench(workdir).adapters
    return [adapters[name, seed % 3, text_merges.PLAN.ranks[0]] for name in found.names]

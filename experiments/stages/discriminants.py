"""Discriminants of the K examples as adapters of the last layer (no training, no zoo).

Covariance and mean of the features are those of the seen tasks' training texts; shrinkage and gain
are those of the best mean accuracy on the seen tasks' validation texts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.data.task import FEWEST
from experiments.stages import conditions, last_layer, zoo_training
from experiments.stages.world import Rows, World
from jlora.generation.generators import discriminant

PATH = "layers/ffn/down/kernel"
SHRINKAGES = (3.0, 10.0, 30.0, 100.0)
GAINS = (0.3, 1.0, 3.0, 10.0)
TEXTS = 1024  # most texts behind the covariance


class Chosen(NamedTuple):
    """What the seen tasks chose."""

    shrinkage: float
    gain: float
    accuracy: float  # mean over their validation texts


def template(world: World, classes: int) -> jl.Adapter:
    """A fresh adapter of the feed-forward output matrices, of rank `classes`."""
    method = jl.LoRA(rank=classes, alpha=float(classes))
    return zoo_training.fresh(world, PATH, method, 0)


def seen_features(world: World, names: Sequence[str]) -> np.ndarray:
    """[N, m] features of training texts of these tasks, at most `TEXTS` of them."""
    index = np.unique(np.concatenate([world.rows[name, "train"].index for name in names]))
    rng = np.random.default_rng([world.config.data_seed, 11])
    return last_layer.features(world, np.sort(rng.permutation(index)[:TEXTS]))


def means(world: World, sets: Sequence[Rows]) -> list[np.ndarray]:
    """Conditions [C m] of each set: class means of the features of labelled texts."""
    every = np.unique(np.concatenate([rows.index for rows in sets]))
    table = last_layer.features(world, every)
    out = []
    for rows in sets:
        embeddings = table[np.searchsorted(every, rows.index)]
        classes = range(rows.label.max() + 1)
        out.append(np.concatenate([embeddings[rows.label == c].mean(0) for c in classes]))
    return out


def fit(world: World, features: np.ndarray, chosen: Chosen) -> discriminant.Discriminant:
    """The generator; its heads and template are replaced by each task's own."""
    one = template(world, FEWEST)
    bank = jax.tree.map(lambda x: x[None], one)
    m = features.shape[1]
    config = discriminant.DiscriminantConfig(PATH, chosen.shrinkage, chosen.gain)
    return discriminant.fit(
        jax.random.key(0), jnp.zeros((1, FEWEST * m)), jnp.zeros(1, jnp.int32), bank,
        jnp.asarray(world.heads[0, :FEWEST]), config, jnp.asarray(features),
    )  # fmt: skip


_generate = jax.jit(discriminant.generate)


def adapter(
    world: World, fitted: discriminant.Discriminant, task: str, condition: np.ndarray
) -> jl.Adapter:
    """The adapter of a task from its condition [C m]."""
    classes = world.task(task).classes
    own = dataclasses.replace(fitted, heads=jnp.asarray(world.head_of(task)[:classes]))
    if classes != FEWEST:
        own = dataclasses.replace(own, template=template(world, classes))
    return _generate(jax.random.key(0), own, jnp.asarray(condition))


def factors(written: jl.Adapter) -> tuple[jax.Array, jax.Array]:
    """(a [m, C], b [C, d]) of the last layer, scale included."""
    own, _ = written.arrays(written.sites[0][0])
    return own["a"][-1], own["b"][-1] * own["scale"][-1]


def right(world: World, task: str, own: jl.Adapter, rows: Rows) -> np.ndarray:
    """bool [n]: what an adapter gets right of labelled texts of a task."""
    a, b = factors(own)
    head = world.head_of(task)
    parts = last_layer.batches(world, rows.index)
    parts_of_answers = [last_layer.answers(world, at, a, b, head)[:real] for at, real in parts]
    return np.concatenate(parts_of_answers) == rows.label


def choose(world: World, names: Sequence[str], features: np.ndarray) -> Chosen:
    """Shrinkage and gain on seen tasks."""
    given = means(world, [conditions.examples(world, name) for name in names])
    grid = list(itertools.product(SHRINKAGES, GAINS))
    fits = {s: fit(world, features, Chosen(s, 1.0, 0.0)) for s in SHRINKAGES}
    score = np.zeros(len(grid))
    for name, condition in zip(names, given, strict=True):
        rows, head = world.rows[name, "validation"], world.head_of(name)
        candidates = {s: factors(adapter(world, fits[s], name, condition)) for s in SHRINKAGES}
        start = 0
        for at, real in last_layer.batches(world, rows.index):
            label = rows.label[start : start + real]
            start += real
            for k, (shrinkage, gain) in enumerate(grid):
                a, b = candidates[shrinkage]
                answers = last_layer.answers(world, at, a, gain * b, head)[:real]
                score[k] += (answers == label).sum() / len(rows.label) / len(names)
    shrinkage, gain = grid[int(score.argmax())]
    return Chosen(shrinkage, gain, float(score.max()))

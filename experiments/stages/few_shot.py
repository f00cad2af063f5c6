"""LoRA trained on the K examples of a condition: what a user does who has no generator.

Optimiser, schedule and form are the zoo's; the learning rate and the number of steps are those of
the best mean accuracy on validation texts of some seen tasks, trained on their own K examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import accuracy, codec, conditions, zoo_training
from experiments.stages.codec import Encoded
from experiments.stages.world import Rows, World
from experiments.stages.zoo_training import Run, TrainState

PyTree = Any
FACTORS = (1.0, 0.3)  # learning rates tried, over the zoo's
STOPS = 4  # a run is looked at so many times
TASKS = 4  # seen tasks that choose


class Set(NamedTuple):
    """Labelled texts of one task."""

    task: str
    rows: Rows


class Chosen(NamedTuple):
    """What the seen tasks chose."""

    factor: float  # learning rate over the zoo's
    stop: int  # at which look training ends, from 0
    accuracy: float  # mean over those tasks' validation texts


def steps_per_look(config: Config) -> int:
    """Steps between two looks."""
    return max(1, config.zoo_steps // STOPS)


def chunk_size(world: World, held_out: int) -> int:
    """How many runs are trained at once, the same for all calls: they share a compilation."""
    return min(world.config.zoo_chunk, held_out or len(FACTORS) * TASKS)


def apart(world: World, sets: Sequence[Set]) -> World:
    """A world in which every set is a task of its own."""
    tasks = [
        dataclasses.replace(world.task(s.task), name=f"{s.task}/{k}") for k, s in enumerate(sets)
    ]
    rows = {(t.name, "train"): s.rows for t, s in zip(tasks, sets, strict=True)}
    heads = np.stack([world.head_of(s.task) for s in sets])
    return world._replace(tasks=tuple(tasks), pool=(), rows=rows, heads=heads)


def train(
    world: World,
    sets: Sequence[Set],
    factors: Sequence[float],
    size: int,
    stops: int,
    bar: Progress,
) -> list[PyTree]:
    """One adapter per set, trained on its texts.

    Args:
      factors: learning rate of each over the zoo's. size: runs at once. stops: looks taken.

    Returns:
      Trainables [sets, ...] at each look.
    """
    looks: list[list[PyTree]] = [[] for _ in range(stops)]
    for start in range(0, len(sets), size):
        real = len(sets[start : start + size])
        # The last chunk is filled up with repeats, so that one compilation serves all.
        pad = [len(sets) - 1] * (size - real)
        which = [*range(start, start + real), *pad]
        snapshots = _train_chunk(
            world, [sets[k] for k in which], [factors[k] for k in which], stops
        )
        for look, trainable in zip(looks, snapshots, strict=True):
            look.append(jax.tree.map(lambda x, n=real: x[:n], trainable))
        bar.step(real)
    return [jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) for parts in looks]


def _train_chunk(
    world: World, sets: Sequence[Set], factors: Sequence[float], stops: int
) -> list[PyTree]:
    config, mine = world.config, apart(world, sets)
    length = steps_per_look(config)
    steps = STOPS * length
    plan = zoo_training.recipe(config, steps)._replace(snapshots=1)
    # Draws depend on a run's name: that of the task, so that all rates see its rows in one order.
    named = zip(sets, mine.tasks, strict=True)
    runs = [Run(f"{s.task}/few", (t.name,), config.seed) for s, t in named]
    trainable = zoo_training.start_points(mine, runs)
    rows = zoo_training.pools(mine, runs)
    state = TrainState(
        trainable,
        jax.vmap(zoo_training.optimizer(plan.rate, steps).init)(trainable),
        jax.tree.map(lambda x: jnp.zeros((len(x), 1, *x.shape[1:]), x.dtype), trainable),
        jnp.zeros(len(runs), jnp.float32),
    )
    base = zoo_training.Base(
        world.upper, zoo_training.template(world, config.seed), world.hidden, world.mask,
        jnp.asarray(mine.heads),
    )  # fmt: skip
    rates, out = jnp.asarray(factors, jnp.float32), []
    for look in range(stops):
        done = jnp.int32(look * length)
        given = (base, rows, state, done, rates)
        state = zoo_training.segment(world.model, plan, length, *given)
        out.append(state.trainable)
    return out


def hits(world: World, encoded: Encoded, task: str, rows: Rows, trainable: PyTree) -> np.ndarray:
    """bool [m, rows]: what adapters [m, ...] get right of labelled texts of a task."""
    tokens = np.asarray(codec.to_tokens(encoded, world.config, trainable))
    there = world._replace(rows={**world.rows, (task, "test"): rows})
    return accuracy.correct(there, encoded, task, tokens)


def choose(world: World, encoded: Encoded, size: int, bar: Progress) -> Chosen:
    """Learning rate and number of steps, on seen tasks that are spread over the list."""
    every = max(1, len(encoded.names) // TASKS)
    names = encoded.names[::every][:TASKS]
    sets = [Set(name, conditions.examples(world, name)) for name in names for _ in FACTORS]
    factors = FACTORS * len(names)
    snapshots = train(world, sets, factors, size, STOPS, bar)
    score = np.zeros((len(FACTORS), STOPS))
    for k, name in enumerate(names):
        rows = world.rows[name, "validation"]
        own = slice(k * len(FACTORS), (k + 1) * len(FACTORS))
        for look, trainable in enumerate(snapshots):
            part = jax.tree.map(lambda x, o=own: x[o], trainable)
            score[:, look] += hits(world, encoded, name, rows, part).mean(1) / len(names)
    factor, stop = np.unravel_index(score.argmax(), score.shape)
    return Chosen(FACTORS[factor], int(stop), float(score.max()))

"""Stage `more_steps`: training on all texts of a held-out task, from several starts.

A generated adapter may be worth having although training ends higher: as a start. So an adapter of
every held-out task is trained from three of them, the generated one (its first sample), the mean of
all seen tasks' adapters, and zero (a fresh adapter: the base), and looked at after k steps. One run
per start, with the zoo's recipe over the largest k; all starts of a task see the same rows in the
same order. Full fine-tuning of the adapted layers (`full_training`) says what an adapter could
reach at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import accuracy, baselines, few_shot, full_training, rivals, zoo_training
from experiments.stages.codec import Encoded
from experiments.stages.sample import Samples
from experiments.stages.world import World
from experiments.stages.zoo_training import Run, TrainState
from experiments.workdir import REDO, read_json, write_json

PyTree = Any
STARTS = ("generated", "mean_adapter", "zero")


class MoreSteps(NamedTuple):
    """The product of the stage."""

    steps: tuple[int, ...]  # at which adapters were looked at, 0 first; empty: not measured
    accuracy: dict[str, dict[str, list[float]]]  # task -> start -> test accuracy at each of `steps`
    full: full_training.Results  # full fine-tuning of the adapted layers


def looks(config: Config) -> tuple[int, ...]:
    """Numbers of steps at which adapters are looked at, 0 first; () where none is asked for."""
    asked = sorted({int(part) for part in config.more_steps.split(",") if part.strip()})
    return (0, *asked) if asked else ()


def starts(world: World, encoded: Encoded, samples: Samples, task: str) -> PyTree:
    """Trainables [3, ...] of one task, in the order of `STARTS`."""
    mean = baselines.soups_of(encoded).mean(0)
    tokens = np.stack([samples.of(task, "generated")[0], mean])
    given = accuracy.unpack(encoded, jnp.asarray(tokens, jnp.float32))
    fresh = zoo_training.start_points(world, [Run(f"{task}/more", (task,), world.config.seed)])
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), given, fresh)


def train(world: World, task: str, trainable: PyTree, steps: Sequence[int]) -> list[PyTree]:
    """Adapters of one task after each number of steps.

    Args:
      trainable: starts [n, ...]. steps: ascending, 0 first.

    Returns:
      Trainables [n, ...] per entry of `steps`.
    """
    config, count = world.config, len(jax.tree.leaves(trainable)[0])
    plan = zoo_training.recipe(config, steps[-1])._replace(snapshots=1)
    length = math.gcd(*steps)  # of what is compiled once
    # Draws depend on a run's name: with the same one, all starts see the same rows.
    rows = zoo_training.pools(world, [Run(f"{task}/more", (task,), config.seed)] * count)
    moments = jax.vmap(zoo_training.optimizer(plan.rate, plan.steps).init)(trainable)
    empty = jax.tree.map(lambda x: jnp.zeros((count, 1, *x.shape[1:]), x.dtype), trainable)
    state = TrainState(trainable, moments, empty, jnp.zeros(count, jnp.float32))
    base = zoo_training.Base(
        world.upper, zoo_training.template(world, config.seed), world.hidden, world.mask,
        jnp.asarray(world.heads),
    )  # fmt: skip
    snapshots = [trainable]
    for done in range(0, steps[-1], length):
        given = (base, rows, state, jnp.int32(done))
        state = zoo_training.segment(world.model, plan, length, *given)
        if done + length in steps:
            snapshots.append(state.trainable)
    return snapshots


def pieces(context: Context, prepared: None) -> list[Piece]:
    """A piece per held-out task, and full fine-tuning."""
    world, encoded, samples = (context.products[name] for name in STAGE.inputs)
    held, steps = rivals.held_out(world, encoded), looks(world.config)
    out = [
        Piece(f"{k}.json", 1, functools.partial(_continued, world, encoded, samples, name, k))
        for k, name in enumerate(held)
        if steps
    ]
    make = functools.partial(_full, world, encoded, held)
    size = full_training.runs(held) if world.config.full_steps else 0
    return [*out, Piece("full.json", size, make)]


def _continued(
    world: World, encoded: Encoded, samples: Samples, task: str, number: int, folder: Path,
    bar: Progress,
) -> None:  # fmt: skip
    rows, curves = world.rows[task, "test"], {name: [] for name in STARTS}
    for trainable in train(world, task, starts(world, encoded, samples, task), looks(world.config)):
        right = few_shot.hits(world, encoded, task, rows, trainable)
        for name, hits in zip(STARTS, right, strict=True):
            curves[name].append(float(hits.mean()))
    write_json(folder / f"{number}.json", {"task": task, "accuracy": curves})
    bar.step(1)


def _full(world: World, encoded: Encoded, held: list[str], folder: Path, bar: Progress) -> None:
    nothing = full_training.Results({}, None)
    full = full_training.run(world, encoded.names, held, bar) if world.config.full_steps else None
    write_json(folder / "full.json", (full or nothing)._asdict())


def read(context: Context, prepared: None, done: Done) -> MoreSteps:
    """All figures."""
    world, encoded, _ = (context.products[name] for name in STAGE.inputs)
    steps, curves = looks(world.config), {}
    for k in range(len(rivals.held_out(world, encoded)) if steps else 0):
        one = read_json(done.path / f"{k}.json", dict, REDO)
        curves[one["task"]] = one["accuracy"]
    full = full_training.Results(**read_json(done.path / "full.json", dict, REDO))
    return MoreSteps(steps, curves, full)


def describe(more: MoreSteps) -> str:
    """Accuracy after the steps, in one line."""
    if not more.accuracy and not more.full.accuracy:
        return "not asked for"
    shown = []
    for start in STARTS if more.accuracy else ():
        mean = 100 * np.mean([row[start] for row in more.accuracy.values()], axis=0)
        points = ", ".join(f"{m:.1f} % at {k}" for k, m in zip(more.steps, mean, strict=True))
        shown.append(f"from {start} {points}")
    if more.full.accuracy:
        mean = 100 * np.mean(list(more.full.accuracy.values()))
        shown.append(f"full fine-tuning {mean:.1f} %")
    return "; ".join(shown)


STAGE = Stage(
    name="more_steps",
    inputs=("data", "codec", "sample"),
    unit="run",
    pieces=pieces,
    read=read,
    describe=describe,
)

"""Stage `zoo`: LoRA adapters of all styles, trained at once over frozen base D.

A run is one (style, seed); held-out styles are trained too, once, as what a generator is compared
with: nothing is fitted on them. Chunks of `zoo_chunk` runs are trained together (`zoo_training`)
and kept as they are finished.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jlora as jl
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages.zoo_training import snapshot_steps
from experiments.styles.pictures import World
from experiments.styles.zoo_training import Recipe, Run, empty, template, train
from experiments.workdir import StageError, load_tree, save_tree, write_json


class Zoo(NamedTuple):
    """The trained adapters."""

    template: jl.Adapter  # frozen parts and sites
    trainable: Any  # leaves [runs, snapshots, ...] float32
    runs: tuple[Run, ...]  # in the order of the leading axis
    loss: np.ndarray  # [runs] of the last segment's training steps

    def of(self, style: str) -> np.ndarray:
        """Positions of a style's runs."""
        return np.flatnonzero([run.style == style for run in self.runs])

    def last(self, style: str) -> jl.Adapter:
        """The adapter at the end of a style's first run."""
        row = int(self.of(style)[0])
        return self.template.replace(trainable=jax.tree.map(lambda x: x[row, -1], self.trainable))


def plan(world: World) -> list[Run]:
    """`zoo_seeds` runs per seen style, one per held-out style."""
    seeds = {s.name: world.settings.zoo_seeds if s.level == "seen" else 1 for s in world.styles}
    return [Run(f"{name}/{k}", name, k) for name, count in seeds.items() for k in range(count)]


def recipe(world: World) -> Recipe:
    """How each run is trained."""
    s = world.settings
    marks = tuple(int(m) for m in snapshot_steps(s.zoo_snapshots, s.zoo_steps))
    return Recipe(s.zoo_steps, marks, s.zoo_lr, s.zoo_batch, s.drop, s.seed)


def chunks(world: World) -> list[list[Run]]:
    """Runs that are trained at once."""
    runs = plan(world)
    size = min(world.settings.zoo_chunk, len(runs))
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def pieces(context: Context, prepared: None) -> list[Piece]:
    """A piece per chunk."""
    world: World = context.products["data"]
    parts = chunks(world)
    size = len(parts[0]) * world.settings.zoo_steps
    return [
        Piece(f"chunk_{k:03d}", size, functools.partial(_train, world, k))
        for k in range(len(parts))
    ]


def _train(world: World, k: int, folder: Path, bar: Progress) -> None:
    parts = chunks(world)
    chunk, size = parts[k], len(parts[0])
    # The last chunk is filled up with repeats, so that one compilation serves all.
    full = [*chunk, *[chunk[-1]] * (size - len(chunk))]
    work = folder / f"work_{k:03d}"
    drawn = [world.train[run.style] for run in full]
    trained = train(world, recipe(world), full, drawn, work, bar)
    save_tree(folder / f"chunk_{k:03d}", jax.tree.map(lambda x: x[: len(chunk)], trained))
    shutil.rmtree(work)


def finish(context: Context, prepared: None, folder: Path) -> dict[str, Any]:
    """Which run is which."""
    runs = plan(context.products["data"])
    write_json(folder / "runs.json", [list(run) for run in runs])
    return {"runs": len(runs)}


def read(context: Context, prepared: None, done: Done) -> Zoo:
    """The zoo of a committed stage.

    Raises:
      StageError: a run with NaN or infinity, by name.
    """
    world: World = context.products["data"]
    parts = [
        load_tree(done.path / f"chunk_{k:03d}", empty(world, recipe(world), len(chunk)))
        for k, chunk in enumerate(chunks(world))
    ]
    whole = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    runs = tuple(plan(world))
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole["snapshots"]):
        good = np.isfinite(leaf.reshape(len(runs), -1)).all(1)
        if not good.all():
            where = runs[int(np.argmin(good))].name
            name = jax.tree_util.keystr(path)
            raise StageError(f"{done.path}: {where}: got NaN or infinity in {name}; lower --zoo_lr")
    return Zoo(template(world), whole["snapshots"], runs, whole["loss"])


def describe(zoo: Zoo) -> str:
    """The zoo in one line."""
    return (
        f"{len(zoo.runs)} adapters, training loss {zoo.loss.mean():.3f} (lowest"
        f" {zoo.loss.min():.3f}, highest {zoo.loss.max():.3f})"
    )


STAGE = Stage(
    name="zoo",
    inputs=("data",),
    unit="run·step",
    pieces=pieces,
    finish=finish,
    read=read,
    describe=describe,
)

"""Stage `zoo`: LoRA adapters of many tasks and seeds, trained at once over one frozen base.

A run is one (task, seed). Chunks of `zoo_chunk` runs are trained together (`zoo_training`), and
each chunk is kept as it is finished.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages.world import World
from experiments.stages.zoo_training import Run, snapshot_steps, template, train
from experiments.workdir import Folder, StageError, load_tree, save_tree, write_json

PyTree = Any
MULTITASK_STEPS = 4  # times the steps of one run


def plan(world: World) -> list[Run]:
    """Zoo runs: `zoo_seeds` per seen task, a reference seed for some, every held-out task once."""
    config = world.config
    seen = [t.name for t in world.tasks if t.level in ("seen", "user")]
    every = max(1, len(seen) // config.references) if config.references else 1
    marked = set(seen[::every][: config.references or None])
    runs = []
    for task in world.tasks:
        seeds = [config.zoo_seeds]
        if task.name in seen:
            seeds = range(config.zoo_seeds + (task.name in marked))
        runs += [Run(f"{task.name}/{s}", (task.name,), s) for s in seeds]
    return runs


def _chunks(world: World) -> list[list[Run]]:
    """Runs that are trained at once."""
    runs = plan(world)
    size = min(world.config.zoo_chunk, len(runs))
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def pieces(context: Context, prepared: None) -> list[Piece]:
    """A piece per chunk of runs, and one for the multi-task adapter."""
    world: World = context.products["data"]
    config, chunks = world.config, _chunks(world)
    size = len(chunks[0]) * config.zoo_steps
    out = [
        Piece(f"chunk_{k:03d}", size, functools.partial(_train_chunk, world, k))
        for k in range(len(chunks))
    ]
    steps = MULTITASK_STEPS * config.zoo_steps
    return [*out, Piece("multitask", steps, functools.partial(_train_multitask, world))]


def _train_chunk(world: World, k: int, folder: Path, bar: Progress) -> None:
    chunks = _chunks(world)
    chunk, size = chunks[k], len(chunks[0])
    # The last chunk is filled up with repeats, so that one compilation serves all.
    full = [*chunk, *[chunk[-1]] * (size - len(chunk))]
    work = folder / f"work_{k:03d}"
    trained = train(world, full, world.config.zoo_steps, work, bar)
    save_tree(folder / f"chunk_{k:03d}", jax.tree.map(lambda x: x[: len(chunk)], trained))
    shutil.rmtree(work)


def _train_multitask(world: World, folder: Path, bar: Progress) -> None:
    seen = tuple(t.name for t in world.tasks if t.level in ("seen", "user"))
    steps = MULTITASK_STEPS * world.config.zoo_steps
    trained = train(world, [Run("multitask", seen, 0)], steps, folder / "work_multi", bar)
    save_tree(folder / "multitask", trained)
    shutil.rmtree(folder / "work_multi")


def finish(context: Context, prepared: None, folder: Path) -> dict[str, Any]:
    """Which run is which."""
    runs = plan(context.products["data"])
    if context.processes.first:
        write_json(folder / "runs.json", [[r.name, list(r.tasks), r.seed] for r in runs])
    return {"runs": len(runs)}


def run(world: World, workdir: Path) -> Zoo:
    """The zoo of a world alone: trained on the first call."""
    return STAGE.run(Context(world.config, workdir, products={"data": world}))


class Zoo(NamedTuple):
    """The trained adapters, as read back."""

    template: jl.Adapter  # frozen parts and sites; its trainable is a fresh start
    trainable: PyTree  # leaves [runs, S, ...] f32
    runs: tuple[Run, ...]  # in the order of the leading axis
    multitask: PyTree  # trainable of the one adapter trained on all seen tasks
    loss: np.ndarray  # [runs] mean training loss of each run's last segment

    def of(self, task: str, seeds: Sequence[int]) -> np.ndarray:
        """Run positions of a task with one of these seeds."""
        hits = [i for i, r in enumerate(self.runs) if r.tasks == (task,) and r.seed in seeds]
        if not hits:
            raise StageError(f"the zoo has no run of task '{task}' with seed in {list(seeds)}")
        return np.asarray(hits)


def read(world: World, workdir: Path) -> Zoo:
    """Load the finished zoo. Raises StageError for damage, missing runs or NaN (named)."""
    folder = Folder(workdir, "zoo", world.config.key("zoo"))
    return load(world, Done(folder.path, folder.verify()))


def load(world: World, done: Done) -> Zoo:
    """The zoo of a committed stage. Raises StageError for missing runs or NaN (named)."""
    runs = tuple(plan(world))
    parts, losses = [], []
    for k, chunk in enumerate(_chunks(world)):
        tree = load_tree(
            done.path / f"chunk_{k:03d}", _empty(world, len(chunk), world.config.zoo_steps)
        )
        parts.append(tree["snapshots"])
        losses.append(tree["loss"])
    trainable = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        bad = ~np.isfinite(leaf.reshape(len(runs), -1)).all(1)
        if bad.any():
            where = runs[int(np.argmax(bad))].name
            raise StageError(
                f"{done.path}: run '{where}' has NaN or infinity in {jax.tree_util.keystr(path)};"
                " lower --zoo_lr or delete the stage's folder and train it again"
            )
    steps = MULTITASK_STEPS * world.config.zoo_steps  # a short run has fewer snapshots
    multi = load_tree(done.path / "multitask", _empty(world, 1, steps))["snapshots"]
    last = jax.tree.map(lambda x: x[0, -1], multi)
    return Zoo(template(world, world.config.seed), trainable, runs, last, np.concatenate(losses))


def _empty(world: World, runs: int, steps: int) -> dict[str, Any]:
    """Shapes of what `train` returns for so many runs of so many steps."""
    copies = len(snapshot_steps(world.config.zoo_snapshots, steps))
    one = template(world, world.config.seed).trainable
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct((runs, copies, *x.shape), x.dtype), one)
    return {"snapshots": shape, "loss": jax.ShapeDtypeStruct((runs,), jnp.float32)}


def describe(zoo: Zoo) -> str:
    """The zoo in one line."""
    return (
        f"{len(zoo.runs)} adapters, training loss {zoo.loss.mean():.3f} (lowest"
        f" {zoo.loss.min():.3f}, highest {zoo.loss.max():.3f}); one multi-task adapter"
    )


STAGE = Stage(
    name="zoo",
    inputs=("data",),
    unit="run·step",
    pieces=pieces,
    finish=finish,
    read=lambda context, prepared, done: load(context.products["data"], done),
    describe=describe,
)

"""Stage `zoo`: LoRA adapters of many tasks and seeds, trained at once over one frozen base.

A run is one (task, seed); chunks of `zoo_chunk` runs are trained together (`zoo_training`) and
kept one by one, so a killed stage resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.progress import Progress
from experiments.stages.world import World
from experiments.stages.zoo_training import Run, snapshot_steps, template, train
from experiments.workdir import Stage, StageError, load_tree, save_tree, write_json

PyTree = Any


def plan(world: World) -> list[Run]:
    """Zoo runs: `zoo_seeds` a seen task, a reference seed for some, every held-out task once."""
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


def _first(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: x[:count], tree)


def run(world: World, workdir: Path) -> Stage:
    """The whole stage: every chunk, then the multi-task adapter; returns the committed stage."""
    config = world.config
    stage = Stage(workdir, "zoo", config.key("zoo"))
    if stage.done:
        return stage
    folder = stage.open()
    runs = plan(world)
    size = min(config.zoo_chunk, len(runs))
    chunks = [runs[i : i + size] for i in range(0, len(runs), size)]
    seen = tuple(t.name for t in world.tasks if t.level in ("seen", "user"))
    multi_steps = 4 * config.zoo_steps
    total = len(chunks) * size * config.zoo_steps + multi_steps
    with Progress(workdir, "zoo", total, "run·step") as bar:
        for k, chunk in enumerate(chunks):
            target = folder / f"chunk_{k:03d}"
            if target.is_dir():
                bar.step(size * config.zoo_steps)
                continue
            # The last chunk is filled up with repeats, so that one compilation serves all.
            full = [*chunk, *[chunk[-1]] * (size - len(chunk))]
            out = train(world, full, config.zoo_steps, folder / f"work_{k:03d}", bar)
            save_tree(target, _first(out, len(chunk)))
            stage.discard(f"work_{k:03d}")
        if not (folder / "multitask").is_dir():
            out = train(world, [Run("multitask", seen, 0)], multi_steps, folder / "work_multi", bar)
            save_tree(folder / "multitask", out)
            stage.discard("work_multi")
    write_json(folder / "runs.json", [[r.name, list(r.tasks), r.seed] for r in runs])
    stage.commit({"runs": len(runs)})
    return stage


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
    stage = Stage(workdir, "zoo", world.config.key("zoo"))
    stage.verify()
    runs = tuple(plan(world))
    size = min(world.config.zoo_chunk, len(runs))
    parts, losses = [], []
    for k, start in enumerate(range(0, len(runs), size)):
        like = _empty(world, len(runs[start : start + size]))
        found = load_tree(stage.path / f"chunk_{k:03d}", like)
        parts.append(found["snapshots"])
        losses.append(found["loss"])
    trainable = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        bad = ~np.isfinite(leaf.reshape(len(runs), -1)).all(1)
        if bad.any():
            where = runs[int(np.argmax(bad))].name
            raise StageError(
                f"{stage.path}: run '{where}' has NaN or infinity in {jax.tree_util.keystr(path)};"
                " lower --zoo_lr or delete the stage's folder and train it again"
            )
    multi = load_tree(stage.path / "multitask", _empty(world, 1))["snapshots"]
    last = jax.tree.map(lambda x: x[0, -1], multi)
    return Zoo(template(world, world.config.seed), trainable, runs, last, np.concatenate(losses))


def _empty(world: World, runs: int) -> dict[str, Any]:
    copies = len(snapshot_steps(world.config.zoo_snapshots, world.config.zoo_steps))
    one = template(world, world.config.seed).trainable
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct((runs, copies, *x.shape), x.dtype), one)
    return {"snapshots": shape, "loss": jax.ShapeDtypeStruct((runs,), jnp.float32)}


def describe(zoo: Zoo) -> str:
    """The stage in a line."""
    return (
        f"{len(zoo.runs)} adapters, training loss {zoo.loss.mean():.3f} (lowest"
        f" {zoo.loss.min():.3f}, highest {zoo.loss.max():.3f}); one multi-task adapter"
    )

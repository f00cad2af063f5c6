r"""What the study measures: cells of (base, variant, rank, seed), each at every learning rate.

A cell trains rates x tasks lanes in one vmapped run; all seeds of a variant and rank share its
compilation. Where a task has a start of its own (an initialisation from data), its rates are the
lanes of one run. A cell is a file in the stage's folder, written whole, so a killed study resumes
with the missing ones.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jlora as jl
from experiments.progress import Progress
from experiments.variant_study import bench as benches
from experiments.variant_study import schedules, starts, training
from experiments.variant_study.bench import Bench
from experiments.variant_study.methods import ATTENTION, VARIANTS, Variant
from experiments.variant_study.training import Run, Schedule
from experiments.workdir import REDO, Folder, read_json, write_json
from jlora.types import Tree

PLAIN = Schedule()


class Plan(NamedTuple):
    """What is swept."""

    bases: tuple[str, ...]  # names of benches
    variants: tuple[str, ...]  # names in VARIANTS
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    factors: tuple[float, ...]  # of the middle learning rate of a variant
    steps: int
    batch: int

    def check(self) -> None:
        """Raises ValueError for a plan that cannot be run or says nothing."""
        known = {"variants": VARIANTS, "bases": benches.known()}
        for flag, names in known.items():
            for name in getattr(self, flag):
                if name not in names:
                    raise ValueError(f"--{flag}: got {name!r}, expected some of {sorted(names)}")
        for name in ("bases", "variants", "ranks", "seeds", "factors"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name}: got {list(values)}, expected different values, at "
                                 "least one")  # fmt: skip
        if len(self.factors) < 2:
            raise ValueError(f"--factors: got {list(self.factors)}, expected 2 or more: a spread "
                             "over learning rates needs them")  # fmt: skip
        for name in ("ranks", "factors"):
            if not min(getattr(self, name)) > 0:
                raise ValueError(f"--{name}: got {min(getattr(self, name))}, expected > 0")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, expected at least 1")


class Cell(NamedTuple):
    """One variant, rank and seed; lists by learning rate, inner ones by task."""

    base: str
    variant: str
    rank: int
    seed: int
    size: int  # trained numbers
    rates: list[float]
    validation: list[list[float]]  # accuracy
    test: list[list[float]]  # accuracy
    loss: list[list[float]]  # training loss at the end


class Group(NamedTuple):
    """Lanes that share a start."""

    base: Tree  # parameters
    adapter: jl.Adapter
    tasks: np.ndarray  # their numbers


def groups(bench: Bench, variant: Variant, rank: int, seed: int) -> list[Group]:
    """All tasks at once, or one after the other where each has a start of its own."""
    every = np.arange(len(bench.names))
    if variant.start is None:
        inputs, _ = bench.pick(bench.data, "train", 0, np.zeros(1, np.int32))
        adapters = jl.init(jax.random.key(seed), bench.apply, bench.base, *inputs,
                       methods={ATTENTION: variant.method(rank)})  # fmt: skip
        if variant.change:
            adapters = variant.change(adapters, seed)
        return [Group(bench.base, adapters, every)]
    methods = {ATTENTION: variant.method(rank)}
    adapters = [variant.start(starts.data(bench, int(t), seed), methods) for t in every]
    return [Group(bench.base, m, every[t : t + 1]) for t, m in enumerate(adapters)]


def how(variant: Variant, rank: int, steps: int, batch: int, adapter: jl.Adapter) -> Run:
    """How the lanes of a variant are trained; one object for equal arguments."""
    return _how(variant.name, rank, steps, batch, schedules.matrices(adapter))


@functools.cache
def _how(name: str, rank: int, steps: int, batch: int, matrices: int) -> Run:
    variant = VARIANTS[name]
    schedule = variant.schedule(rank, steps, matrices) if variant.schedule else PLAIN
    return Run(variant.solver, schedule, steps, batch)


def measure(bench: Bench, variant: Variant, rank: int, seed: int, plan: Plan) -> Cell:
    """Trains and judges one cell."""
    rates = [variant.rate * f for f in sorted(plan.factors)]
    parts: dict[str, list[np.ndarray]] = {"validation": [], "test": [], "loss": []}
    size = 0
    for base, adapter, tasks in groups(bench, variant, rank, seed):
        run = how(variant, rank, plan.steps, plan.batch, adapter)
        at = np.tile(tasks, len(rates))
        lanes = training.train(bench, run, base, adapter, np.repeat(rates, len(tasks)), at, seed)
        size = sum(x.size for x in jax.tree.leaves(adapter.trainable))
        parts["loss"].append(lanes.loss.reshape(len(rates), -1))
        for split in ("validation", "test"):
            right = training.judge(bench, run, base, adapter, lanes, split, at)
            parts[split].append(right.reshape(len(rates), -1))
    grids = {name: np.concatenate(blocks, axis=1).tolist() for name, blocks in parts.items()}
    return Cell(bench.name, variant.name, rank, seed, size, rates, **grids)


def sweep(
    bench: Bench, plan: Plan, workdir: Path, make: Callable[..., Cell] = measure
) -> list[Cell]:
    """All cells of a base; finished ones are read back.

    Args:
      bench: base model and tasks.
      plan: what is swept.
      workdir: where cells are kept, under a hash of what they depend on.
      make: measures one cell.
    """
    settings = {"bench": [bench.name, bench.key], "steps": plan.steps, "batch": plan.batch,
                "factors": sorted(plan.factors)}  # fmt: skip
    blob = json.dumps(settings, sort_keys=True)
    folder = Folder(workdir, "cells", hashlib.sha256(blob.encode()).hexdigest()[:10]).open()
    todo = [(VARIANTS[v], r, s) for v in plan.variants for r in plan.ranks for s in plan.seeds]
    out = []
    with Progress(workdir, f"variants on {bench.name}", len(todo), "cell") as bar:
        for variant, rank, seed in todo:
            file = folder / f"{variant.name.replace(' ', '_')}-{rank}-{seed}.json"
            if not file.is_file():
                write_json(file, make(bench, variant, rank, seed, plan)._asdict())
            out.append(read(file))
            bar.step(1, accuracy=float(np.max(np.mean(out[-1].test, axis=1))))
    return out


def read(file: Path) -> Cell:
    """A kept cell.

    Raises:
      StageError: the file is not a valid JSON object; it says what to do.
      ValueError: it lacks a field or has one too many.
    """
    kept: Mapping[str, Any] = read_json(file, dict, REDO)
    missing: Sequence[str] = sorted(set(Cell._fields) ^ set(kept))
    if missing:
        raise ValueError(f"{file}: got {sorted(kept)}, expected {list(Cell._fields)}; {REDO}")
    return Cell(**kept)

r"""What the study measures: cells of (variant, rank, seed), each at every learning rate.

A cell trains rates x tasks lanes in one vmapped run (`experiments.claims.text_methods.train`); all
seeds of a variant and rank share its compilation. A cell is a file in the stage's folder, written
whole, so a killed study resumes with the missing ones.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.claims import text_methods as lib
from experiments.merging import cells as merging_cells
from experiments.progress import Progress
from experiments.stages.world import World, build
from experiments.variant_study.methods import VARIANTS, Variant
from experiments.workdir import REDO, Folder, read_json, write_json


class Plan(NamedTuple):
    """What is swept."""

    variants: tuple[str, ...]  # names in VARIANTS
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    factors: tuple[float, ...]  # of the middle learning rate of a variant
    steps: int
    batch: int

    def check(self) -> None:
        """Raises ValueError for a plan that cannot be run or says nothing."""
        for name in self.variants:
            if name not in VARIANTS:
                raise ValueError(f"--variants: got {name!r}, expected some of {sorted(VARIANTS)}")
        for name in ("variants", "ranks", "seeds", "factors"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name}: got {list(values)}, expected different values, at "
                                 "least one")  # fmt: skip
        for name in ("ranks", "factors"):
            if not min(getattr(self, name)) > 0:
                raise ValueError(f"--{name}: got {min(getattr(self, name))}, expected > 0")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, expected at least 1")


class Cell(NamedTuple):
    """One variant, rank and seed; lists by learning rate, inner ones by task."""

    variant: str
    rank: int
    seed: int
    size: int  # trained numbers
    rates: list[float]
    validation: list[list[float]]  # accuracy
    test: list[list[float]]  # accuracy
    loss: list[list[float]]  # training loss at the end


def world(workdir: Path, cache: Path | None, *, toy: bool) -> World:
    """The base model and tasks of the study.

    Args:
      workdir: where the states of the texts are kept.
      cache: of downloads; None: the default.
      toy: a random encoder and made-up sentences.
    """
    config = lib.CONFIG
    if toy:
        config = dataclasses.replace(config, base="tiny", tasks="toy", layers=1, max_length=8,
                                     train_texts=20, eval_rows=20, examples=4)  # fmt: skip
    return build(config, workdir, cache)


def tasks(world: World) -> lib.Tasks:
    """The seen tasks of a world, as the harness of the claims takes them."""
    names = tuple(world.names("seen"))

    def split(name: str) -> tuple[Any, Any]:
        rows = [world.rows[n, name] for n in names]
        most = max(len(r.index) for r in rows)
        if name != "train":  # rows are judged in equal groups; those that fill none are left out
            most = max(most // lib.ROWS, 1) * lib.ROWS
        index = np.stack([np.resize(r.index, most) for r in rows])
        label = np.stack([np.resize(r.label, most) for r in rows])
        return jnp.asarray(index, jnp.int32), jnp.asarray(label, jnp.int32)

    heads = jnp.asarray(np.stack([world.head_of(n) for n in names]))
    apply = merging_cells.text_classifier(world.model, world.config.head_scale)
    return lib.Tasks(apply, world.upper, names, *split("train"), heads, world.hidden, world.mask,
                     split("validation"), split("test"))  # fmt: skip


def measure(found: lib.Tasks, variant: Variant, rank: int, seed: int, plan: Plan) -> Cell:
    """Trains and judges one cell."""
    recipe, count = _recipe(variant.name, rank, plan.steps, plan.batch), len(found.names)
    adapter = lib.fresh(found, recipe, seed)
    rates = [recipe.rate * f for f in sorted(plan.factors)]
    at = np.tile(np.arange(count), len(rates))
    made = lib.train(found, recipe, adapter, np.repeat(rates, count), at, seed)
    trained = adapter.replace(trainable=made.trainable)

    def grid(x: np.ndarray) -> list[list[float]]:
        return x.reshape(len(rates), count).tolist()

    right = [lib.judge(found, trained, rows, at).mean(1) for rows in (found.validation, found.test)]
    return Cell(variant.name, rank, seed, lib.size(adapter), rates, *map(grid, right),
                grid(made.loss))  # fmt: skip


@functools.cache
def _recipe(name: str, rank: int, steps: int, batch: int) -> lib.Recipe:
    """One object per variant and rank: what is compiled for it is compiled once."""
    return VARIANTS[name].recipe(rank, steps, batch)


def sweep(
    world: World, plan: Plan, workdir: Path, make: Callable[..., Cell] = measure
) -> list[Cell]:
    """All cells; finished ones are read back.

    Args:
      world: base model and tasks.
      plan: what is swept.
      workdir: where cells are kept, under a hash of what they depend on.
      make: measures one cell.
    """
    settings = {"world": world.config.key("data"), "steps": plan.steps, "batch": plan.batch,
                "factors": sorted(plan.factors)}  # fmt: skip
    blob = json.dumps(settings, sort_keys=True)
    folder = Folder(workdir, "cells", hashlib.sha256(blob.encode()).hexdigest()[:10]).open()
    todo = [(VARIANTS[v], r, s) for v in plan.variants for r in plan.ranks for s in plan.seeds]
    out, found = [], tasks(world)
    with Progress(workdir, "variants", len(todo), "cell") as bar:
        for variant, rank, seed in todo:
            file = folder / f"{variant.name}-{rank}-{seed}.json"
            if not file.is_file():
                write_json(file, make(found, variant, rank, seed, plan)._asdict())
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

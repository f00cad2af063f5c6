"""Stage `layered`: the generator that `jlora generate` ships, fitted on this run's seen tasks.

The generator is `jlora.generation.generators.layered`: scores of a task's K examples that are
linear in features of several layers, with the means of classes that the seen tasks have, written as
one adapter. Nothing is trained. On held-out tasks it is compared with two controls: labels of the
examples shuffled, and no class remembered.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import conditions, layered, rivals
from experiments.stages.codec import Encoded
from experiments.stages.layered import TURNED, Fitted
from experiments.stages.world import Rows, World
from experiments.workdir import REDO, read_json, write_json

CONTROLS = ("shuffled", "no_memory")


class Results(NamedTuple):
    """The product of the stage."""

    accuracy: dict[str, dict[str, float]]  # held-out task -> method -> test accuracy
    controls: dict[str, float]  # mean over the held-out tasks


def accuracies(world: World, fitted: Fitted, name: str) -> dict[str, float]:
    """Test accuracy of a task by the adapter of its examples, and by those of the controls.

    Args:
      world: base and texts.
      fitted: the generator.
      name: of the task.
    """
    few, rows = conditions.examples(world, name), world.rows[name, "test"]
    head = world.head_of(name)[: world.task(name).classes]
    features = layered.read(world, few.index).features
    hits = layered.right(world, rows, head)
    rng = np.random.default_rng([world.config.data_seed, *name.encode()])
    moved = Rows(few.index, rng.permutation(few.label))
    cases = {
        "layered": (fitted, few),
        "shuffled": (fitted, moved),
        "no_memory": (fitted._replace(known=None), few),
    }
    return {
        key: float(hits(*layered.factors(world, state, features, part.label, head)).mean())
        for key, (state, part) in cases.items()
    }


def pieces(context: Context, prepared: None) -> list[Piece]:
    """The fit and all tasks, in one."""
    world, encoded = (context.products[name] for name in STAGE.inputs)
    held = rivals.held_out(world, encoded)
    run = functools.partial(_run, world, encoded, held)
    return [Piece("layered.json", TURNED + 1 + len(held), run)]


def _run(world: World, encoded: Encoded, held: list[str], folder: Path, bar: Progress) -> None:
    fitted = layered.fit(world, encoded.names, bar)
    rows = {}
    for name in held:
        rows[name] = accuracies(world, fitted, name)
        bar.step(1)
    results = {
        "accuracy": {name: {"layered": row["layered"]} for name, row in rows.items()},
        "controls": {
            key: float(np.mean([row[key] for row in rows.values()])) for key in CONTROLS if rows
        },
    }
    write_json(folder / "layered.json", results)


def read(context: Context, prepared: None, done: Done) -> Results:
    """All figures."""
    stored: dict[str, Any] = read_json(done.path / "layered.json", dict, REDO)
    return Results(**stored)


def describe(results: Results) -> str:
    """The stage in one line."""
    if not results.accuracy:
        return "no held-out task"
    mean = np.mean([row["layered"] for row in results.accuracy.values()])
    return f"on {len(results.accuracy)} held-out tasks: layered {100 * mean:.1f} %"


STAGE = Stage(
    name="layered",
    inputs=("data", "codec"),
    unit="step",
    pieces=pieces,
    read=read,
    describe=describe,
)

"""An adapter for one's own task from a generator: nothing is trained.

The task is a folder as `experiments.data.user` reads it. At most K of its training texts of each
class are examples; its test texts are only asked for. What the same examples give without a
generator (nearest class mean, neighbours, logistic regression on the base's embeddings) is compared
by cross-validation on the examples, and the first line of the result says which to use.

The folder that is written::

    peft/  orbax/        the adapter, as PEFT and as Orbax directories
    head.safetensors     "head" [C, d] float32: logits = head_scale * head @ embedding
    generated.json       classes in the order of the head, head_scale, max_length, the figures
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jlora as jl
from experiments.data import user
from experiments.data.task import Task
from experiments.generating import checkpoint, measure
from experiments.generating.checkpoint import Checkpoint
from experiments.report import names
from experiments.stages import (
    base_model,
    cross_validation,
    layered,
    rivals,
    user_tasks,
)
from experiments.stages.base_model import Base
from experiments.stages.cross_validation import Verdict
from experiments.stages.world import Rows, World, make_heads
from experiments.workdir import StageError, write_json

ORDER = ("generated", *measure.FEW)
HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}  # where others find a pinned base
BATCH = 64  # texts per call of the base
ROUNDING = 1e-5  # features that differ by less, relative to the largest, are the same in float32


class TaskAdapter(NamedTuple):
    """The adapter of one task, and how it compares."""

    task: Task  # names and descriptions of the classes
    adapter: jl.Adapter  # of the base's upper layers
    head: np.ndarray  # class vectors [C, d]
    examples: list[int]  # of each class
    verdict: Verdict | None  # which method to use; None: a class has a single example
    test: dict[str, dict[str, Any]]  # method -> accuracy on the test texts with its interval


def load(folder: Path, cache: Path | None) -> tuple[Checkpoint, Base]:
    """A generator and its base.

    Args:
      folder: of the generator.
      cache: of downloads; None: the default one.

    Raises:
      StageError: a damaged generator, or a base with other weights than it was trained on.
      AssetError: the base is neither in the cache nor to be had.
    """
    fitted = checkpoint.read(folder)
    base = base_model.load(fitted.config, cache)
    got = checkpoint.fingerprint(base.params)
    if got != fitted.base_sha256:
        raise StageError(
            f"{folder}: is of another base: the sha256 of {fitted.config.base} is {got}, expected"
            f" {fitted.base_sha256}"
        )
    return fitted, base


def world_of(generator: Checkpoint, base: Base, task: Task, k: int) -> World:
    """The base with one task: at most K training texts of each class, and all test texts.

    Args:
      generator: the generator.
      base: of it.
      task: of `user.tasks`.
      k: K.

    Raises:
      ValueError: the base says NaN or infinity of a text.
    """
    config = dataclasses.replace(generator.config, examples=k)
    read = user.data(task.source.partition(":")[2])
    texts, label = read.train
    rng = np.random.default_rng([config.data_seed, *task.name.encode()])
    sides = [rng.permutation(np.flatnonzero(label == c))[:k] for c in range(task.classes)]
    few = np.concatenate(sides)
    asked = [*(texts[i] for i in few), *read.test[0]]
    parts = [
        base_model.states(base, asked[i : i + BATCH], config, BATCH)
        for i in range(0, len(asked), BATCH)
    ]
    hidden, mask, embedding = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not (np.isfinite(hidden).all() and np.isfinite(embedding).all()):
        raise ValueError(f"{task.name}: the base says NaN or infinity of a text, expected numbers")
    count = len(few)
    rows = {
        (task.name, "train"): Rows(np.arange(count), label[few]),
        (task.name, "test"): Rows(np.arange(count, len(asked)), read.test[1]),
    }
    return World(
        config=config, model=base.config, upper=base_model.upper(base, config),
        below=base_model.lower_count(base, config), hidden=jnp.asarray(hidden),
        mask=jnp.asarray(mask), embedding=embedding, tasks=(task,), pool=(), rows=rows,
        heads=make_heads(config, [task], {}, base.config.width), text={},
    )  # fmt: skip


def make(generator: Checkpoint, world: World) -> TaskAdapter:
    """The adapter of a world's one task, and its rivals.

    Args:
      generator: the generator.
      world: of `world_of`.

    Raises:
      ValueError: the examples of all classes are the same to the base, so that nothing tells the
        classes apart, or an adapter that is not finite.
    """
    (task,) = world.tasks
    few, rows = world.rows[task.name, "train"], world.rows[task.name, "test"]
    head = world.heads[0]
    features = layered.read(world, few.index).features
    spread = np.ptp(features, axis=0).max(-1)  # of each layer
    if (spread <= ROUNDING * np.abs(features).max((0, 2))).all():
        raise ValueError(
            f"{task.name}: the examples of all classes are the same to the base, expected texts"
            f" that differ in their first {world.config.max_length} tokens"
        )
    a, b = layered.factors(world, generator.fitted, features, few.label, head)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{task.name}: got an adapter with NaN or infinity, expected numbers")
    adapter = layered.adapter(world, a, b)
    hits = {"generated": layered.right(world, rows, head)(a, b)}
    for key, classify in rivals.classifiers(generator.frozen).items():
        hits[key] = rivals.right(world, classify, few, rows)
    adapters = {"generated": 1}
    test = {key: user_tasks.cell(row[None], adapters.get(key, 0)) for key, row in hits.items()}
    counts = np.bincount(few.label, minlength=task.classes).tolist()
    return TaskAdapter(task, adapter, head, counts, _validated(generator, world, features), test)


def _validated(generator: Checkpoint, world: World, features: np.ndarray) -> Verdict | None:
    """Every method on each fold of the examples."""
    (task,), head = world.tasks, world.heads[0]
    few = world.rows[task.name, "train"]
    parts = cross_validation.folds(few.label, world.config.data_seed)
    if not parts:
        return None
    scores = {key: np.zeros(len(few.label)) for key in ORDER}
    answers = layered.right(world, few, head)
    for part in parts:
        kept, hidden = (cross_validation.taken(few, where) for where in part)
        result = layered.factors(world, generator.fitted, features[part.kept], kept.label, head)
        scores["generated"][part.hidden] = answers(*result)[part.hidden]
        for key, classify in rivals.classifiers(generator.frozen).items():
            scores[key][part.hidden] = rivals.right(world, classify, kept, hidden)
    return cross_validation.verdict(scores, seed=world.config.seed)


def save(result: TaskAdapter, world: World, target: Path) -> None:
    """Writes the folder of one task whole: temporary folder and rename.

    Args:
      result: the adapter.
      world: of it.
      target: replaced if it is there.
    """
    temp = target.with_name(target.name + ".tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    config = world.config
    hub = HUB.get(config.base, config.base.removeprefix("hf:"))
    jl.io.save_peft(temp / "peft", result.adapter, jl.io.bert(layer_offset=world.below), hub)
    jl.io.save_adapter(temp / "orbax", jax.tree.map(np.asarray, result.adapter))
    save_file({"head": np.ascontiguousarray(result.head, np.float32)}, temp / "head.safetensors")
    about = {
        "description": result.task.description, "classes": list(result.task.class_names),
        "base": hub, "head_scale": config.head_scale, "max_length": config.max_length,
        "first_layer": world.below, "examples_per_class": result.examples, "test": result.test,
        "cross_validation": cross_validation.as_json(result.verdict),
    }  # fmt: skip
    write_json(temp / "generated.json", about)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temp, target)


def lines(result: TaskAdapter) -> list[str]:
    """The result for the terminal: which to use, then a row per method.

    Args:
      result: of one task.
    """
    each = result.examples
    span = f"{min(each)}" if min(each) == max(each) else f"{min(each)} to {max(each)}"
    count = result.test["generated"]["n"]
    out = [
        f"{result.task.name}: {cross_validation.sentence(result.verdict)}.",
        f"  {len(each)} classes, {span} examples of each; {count} test texts.",
        f"  {'method':28s} cross-validated   test accuracy   95 % interval",
    ]
    figures = result.verdict.figures if result.verdict else {}
    for key in ORDER:
        own = f"{100 * figures[key]['mean']:6.1f} %" if key in figures else f"{'–':>8s}"
        cell = result.test[key]
        out.append(
            f"  {names.method(key).label:28s} {own:>15s} {100 * cell['mean']:13.1f} %"
            f"   {100 * cell['low']:4.1f} to {100 * cell['high']:5.1f} %"
        )
    return out


def run(
    task_dir: Path, out: Path, generator: Path, k: int, cache: Path | None, overwrite: bool
) -> list[str]:
    """Adapters of one task, or of every task of a folder, each saved; returns what to print.

    Args:
      task_dir: folder of a task, or of several.
      out: written: the folder of the task, or a folder with one per task.
      generator: folder of the generator.
      k: examples of each class at most; 0: as many as the generator was measured with.
      cache: of downloads; None: the default one.
      overwrite: whether what is there may be replaced.

    Raises:
      StageError, AssetError: as `load`.
      ValueError: a task folder that is not as it must be, or `out` is there.
    """
    if k < 0:
        raise ValueError(f"examples: got {k}, expected >= 1")
    tasks = user.tasks(task_dir)
    alone = (task_dir / "task.json").is_file()
    targets = [out if alone else out / task.name for task in tasks]
    for target in targets:
        if target.exists() and not overwrite:
            raise ValueError(f"{target}: is there; expected a new folder, or --overwrite")
        if target.exists() and not (target / "generated.json").is_file():
            raise ValueError(f"{target}: is not of this command, so it is not overwritten")
    fitted, base = load(generator, cache)
    shown: list[str] = []
    for task, target in zip(tasks, targets, strict=True):
        world = world_of(fitted, base, task, k or fitted.config.examples)
        result = make(fitted, world)
        save(result, world, target)
        shown += [*lines(result), f"  Adapter: {target}"]
    return shown

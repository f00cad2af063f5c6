"""Adapters for tasks the zoo never saw, on a finished workdir: `--task_dir` with
`--stage=sample,evaluate`.

Each task gets `--samples` adapters generated from its descriptions and K training examples per
class (no training), saved as Orbax and PEFT under `<workdir>/user/<task>/` and scored on all texts
of its test split alongside the base model, the baselines, the rivals that see the same K examples
(the discriminant, which is an adapter too, is saved as PEFT), and what all its texts give. Which of
them to use is decided by cross-validation on the K examples alone: the first line says it. A task
of more classes than any of the zoo's gets an adapter per class (`one_against_rest`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.config import Config
from experiments.data import user
from experiments.data.task import Task, slug
from experiments.pipeline import Context
from experiments.progress import Progress
from experiments.report import names, wilson
from experiments.stages import (
    accuracy,
    base_model,
    codec,
    conditions,
    cross_validation,
    sample,
    user_methods,
    zoo_training,
)
from experiments.stages.cross_validation import Verdict
from experiments.stages.user_methods import Kit
from experiments.stages.world import SPLITS, Rows, World, make_heads, phrases
from experiments.stages.zoo_training import Run
from experiments.workdir import StageError, write_json

PyTree = Any
ORDER = names.keys(names.USER)


def extend(world: World, config: Config, cache: Path | None) -> World:
    """The same base with the user's tasks instead of the zoo's (their texts are encoded here)."""
    tasks = tuple(user.tasks(config.task_dir))
    if not tasks:
        raise StageError(f"--task_dir={config.task_dir}: holds no task folder")
    base = base_model.load(config, cache)
    texts: dict[str, int] = {}
    rows = {}
    for task in tasks:
        labelled = user.data(task.source.partition(":")[2])
        for split in SPLITS:
            words, labels = getattr(labelled, split)
            index = [texts.setdefault(w, len(texts)) for w in words]
            rows[task.name, split] = Rows(np.asarray(index, np.int32), np.asarray(labels, np.int32))
    parts = [
        base_model.states(base, list(texts)[i : i + 64], config, 64)
        for i in range(0, len(texts), 64)
    ]
    hidden, mask, embedding = (np.concatenate(p) for p in zip(*parts, strict=True))
    text = phrases(base, tasks, config.max_length)
    return world._replace(
        config=config,
        hidden=jnp.asarray(hidden),
        mask=jnp.asarray(mask),
        embedding=embedding,
        tasks=tasks,
        pool=(),
        rows=rows,
        heads=make_heads(config, tasks, text, base.config.width),
        text=text,
    )


class Data(NamedTuple):
    """What is known of a user's task before any adapter is evaluated; written as data.json."""

    test_texts: int  # n of each accuracy
    test_texts_per_class: dict[str, int]  # class name -> texts
    chance: float  # accuracy of always naming the larger class
    train_texts: int  # of which the condition sees some and the trained adapter all
    examples_per_class: int  # K, in the condition
    max_length: int  # tokens that are read of a text
    longer_texts: int  # texts, of all splits, that have more
    adapter_per_class: bool  # the zoo has no task of so many classes: each against the rest

    def sentences(self) -> list[str]:
        """The same in words."""
        counts = ", ".join(f"{n} {name}" for name, n in self.test_texts_per_class.items())
        out = [
            f"{self.test_texts} test texts ({counts}): chance is {100 * self.chance:.1f} %.",
            f"Generated from the descriptions and at most {self.examples_per_class} examples per"
            f" class, drawn from {self.train_texts} training texts.",
        ]
        if self.adapter_per_class:
            out.append(
                f"The zoo has no task of {len(self.test_texts_per_class)} classes: what is"
                " generated from a condition is one adapter per class, of that class against the"
                " rest, and the largest margin decides."
            )
        if self.longer_texts:
            out.append(
                f"{self.longer_texts} texts have more than max_length={self.max_length} tokens:"
                " the rest of them is not read."
            )
        return out


class Scores(NamedTuple):
    """The result of one task."""

    data: Data  # how many texts
    cells: dict[str, dict[str, Any]]  # method -> `cell`
    verdict: Verdict | None  # which to use; None: a class has a single example


def describe(world: World, base: base_model.Base, task: Task, zoo_classes: int) -> Data:
    """Count a task's texts; `zoo_classes`: of the zoo's task that has most."""
    config, label = world.config, world.rows[task.name, "test"].label
    rows = user.data(task.source.partition(":")[2])
    texts = [text for split in SPLITS for text in getattr(rows, split)[0]]
    counts = np.bincount(label, minlength=task.classes)
    return Data(
        test_texts=len(label),
        test_texts_per_class=dict(zip(task.class_names, counts.tolist(), strict=True)),
        chance=float(counts.max() / len(label)),
        train_texts=len(world.rows[task.name, "train"].label),
        examples_per_class=config.examples,
        max_length=config.max_length,
        longer_texts=base_model.longer(base, texts, config.max_length),
        adapter_per_class=task.classes > zoo_classes,
    )


def cell(hits: np.ndarray, adapters: int | None = None) -> dict[str, Any]:
    """{mean, low, high, confidence, std, n, adapters} of bool [adapters, texts].

    n counts texts, and the interval is over them; std is over adapters. `adapters=0` says that a
    row of hits is of a classifier without one.
    """
    each = hits.mean(1)
    mean = float(each.mean())
    bounds = wilson.interval(mean, hits.shape[1])
    return {
        "mean": mean,
        "low": bounds.low,
        "high": bounds.high,
        "confidence": 0.95,
        "std": float(each.std(ddof=1)) if len(each) > 1 else 0.0,
        "n": hits.shape[1],
        "adapters": len(each) if adapters is None else adapters,
    }


def train(world: World, workdir: Path) -> PyTree:
    """Trainables [tasks, ...] of one adapter per task, trained as the zoo's on the task's texts."""
    runs = [Run(f"{t.name}/user", (t.name,), world.config.seed) for t in world.tasks]
    steps = world.config.zoo_steps
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        with Progress(workdir, "user zoo", len(runs) * steps, "run·step") as bar:
            trained_zoo = zoo_training.train(world, runs, steps, Path(folder), bar)
    return jax.tree.map(lambda x: x[:, -1], trained_zoo["snapshots"])


def run(context: Context) -> dict[str, Scores]:
    """Generate, score and save; returns {task: Scores}, of which the cells are scores.json.

    Args:
      context: `task_dir` in its config, products of a finished run without it.
    """
    config, workdir, zoo_world = context.config, context.workdir, context.products["data"]
    of, mine = user_methods.kit(context), extend(zoo_world, config, context.cache)
    base = base_model.load(config, context.cache)
    folder = workdir / "user"
    folder.mkdir(exist_ok=True)
    own = np.asarray(codec.to_tokens(of.encoded, config, train(mine, workdir)))
    few = user_methods.train_few(of, mine, workdir)
    out: dict[str, Scores] = {}
    with Progress(workdir, "user tasks", len(mine.tasks), "task") as bar:
        for number, task in enumerate(mine.tasks):
            few_texts = conditions.of_examples(mine, task.name)
            candidates = user_methods.adapters(of, few_texts, task.name)
            table = {**of.fixed, **candidates, "trained": own[number : number + 1]}
            cells = {
                name: cell(
                    user_methods.hits(mine, of.encoded, task.name, tokens),
                    int(np.prod(tokens.shape[:-2])),
                )
                for name, tokens in table.items()
            }
            prior, more = user_methods.rival_hits(of, mine, task.name, few[task.name][0])
            for name, hits in more.items():
                cells[name] = cell(hits, 1 if name in ("lora_k", "discriminant") else 0)
            verdict = user_methods.cross_validate(of, mine, task.name, few[task.name][1:])
            data = describe(mine, base, task, zoo_world.classes)
            out[task.name] = Scores(data, cells, verdict)
            _save(
                of, mine, task, candidates["generated"], prior, folder / task.name, out[task.name]
            )
            bar.step(1)
    write_json(folder / "scores.json", {name: scores.cells for name, scores in out.items()})
    write_json(folder / "settings.json", dataclasses.asdict(config))
    return out


def _save(
    of: Kit,
    mine: World,
    task: Task,
    generated: np.ndarray,
    prior: jl.Adapter,
    target: Path,
    scores: Scores,
) -> None:
    """The generated adapters, the discriminant, and the figures of one task."""
    flat = jnp.asarray(generated.reshape(-1, *generated.shape[-2:]))
    trainables = accuracy.unpack(of.encoded, flat)
    jl.io.save_adapter(target / "orbax", codec.bank(of.encoded, trainables), overwrite=True)
    whole = [target / "peft"]
    if generated.ndim > 3:  # an adapter per class
        whole = [target / "peft" / f"{c}_{slug(name)}" for c, name in enumerate(task.class_names)]
    for c, folder in enumerate(whole):
        first = jax.tree.map(lambda x, c=c: x[c], trainables)
        adapter = of.encoded.template.replace(trainable=first)
        sample.export_peft(mine, adapter, folder, task.description)
    sample.export_peft(mine, prior, target / "discriminant", task.description)
    write_json(target / "data.json", scores.data._asdict())
    write_json(target / "scores.json", scores.cells)
    write_json(target / "cross_validation.json", cross_validation.as_json(scores.verdict))


def lines(task: str, scores: Scores) -> list[str]:
    """One task's result for the terminal: what to use, data, then a row per method."""
    data = scores.data
    out = [f"{task}: {cross_validation.sentence(scores.verdict)}."]
    out += [f"  {sentence}" for sentence in data.sentences()]
    out.append(f"  {'method':14s} accuracy   95 % interval   adapters   cross-validated")
    validated: Mapping[str, Any] = scores.verdict.figures if scores.verdict else {}
    order = [key for key in ORDER if key in scores.cells]
    for key in order:
        cell = scores.cells[key]
        bounds = wilson.Interval(cell["low"], cell["high"])
        own = f"{100 * validated[key]['mean']:6.1f} %" if key in validated else f"{'–':>8s}"
        row = (
            f"  {key:14s} {100 * cell['mean']:6.1f} %   {100 * bounds.low:4.1f} to"
            f" {100 * bounds.high:5.1f} %   {cell['adapters'] or '–':>8}   {own:>15s}"
        )
        if key in ("generated", "trained"):
            row += f"   {wilson.against(bounds, data.chance)} chance"
        out.append(row)
    out.append(
        f"  Of all methods trained and logreg_full see all {data.train_texts} training texts, the"
        f" others at most {data.examples_per_class} per class."
    )
    return out

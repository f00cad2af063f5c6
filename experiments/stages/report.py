"""Stage `report`: report.json, report.html and arrays.npz in the workdir."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.data.task import FEWEST
from experiments.pipeline import Context, Done, Stage, Times
from experiments.report import arrays as report_arrays
from experiments.report import build, html, schema, words
from experiments.report import more_steps as report_steps
from experiments.stages import episodes, few_shot, layered_stage, more_steps, rivals, sample
from experiments.stages.codec import VARIANTS
from experiments.stages.world import World
from experiments.workdir import REDO, Folder, read_json

DENOISERS = ("generator", "pdiff_global", "pdiff_task")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def environment() -> dict[str, Any]:
    """Versions and machine; nothing that differs between two runs on one machine."""
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    cores = os.cpu_count()
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores,
    } | versions


def curves(workdir: Path, config: Config) -> dict[str, tuple[list[float], list[float]]]:
    """Loss curves of all trained parts, thinned to at most 200 points each."""
    codec, denoiser = (
        Folder(workdir, name, config.key(name)).path for name in ("codec", "denoiser")
    )
    files = [("codec", codec / f"curves_{name}.json") for name in VARIANTS]
    files += [(name, denoiser / f"curves_{name}.json") for name in DENOISERS]
    out = {}
    for group, file in files:
        stored = read_json(file, dict, REDO)
        flat = {}
        for name, value in stored.items():
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            flat |= {f"{name}/{k}".strip("/"): v for k, v in parts if k != "loss"}
        for name, values in flat.items():
            block = max(1, len(values) // 200)
            keep = np.asarray(values, float)[: len(values) // block * block].reshape(-1, block)
            if not keep.any():
                continue
            at = ((np.arange(len(keep)) + 1) * block).tolist()
            out[f"{group} {name}"] = (at, keep.mean(1).tolist())
    return out


def read(context: Context, prepared: None, done: Done) -> dict[str, Any]:
    """Build, validate and write the report; returns it."""
    world, encoded, others, evaluated, more, own, read_layers = (
        context.products[name] for name in STAGE.inputs
    )
    workdir, command = context.workdir, context.command
    times = Times(workdir).all()
    config = world.config
    tasks, audit = evaluated["tasks"], dict(evaluated["audit"])
    seen = {
        n: {k: v for k, v in tasks[n]["accuracy"].items() if k in schema.SEEN_KEYS}
        for n in encoded.names
    }
    unseen: dict[str, dict[str, Any]] = {}
    for task in world.tasks:
        if task.name not in encoded.names:
            row = tasks[task.name]["accuracy"] | others.accuracy[task.name]
            row |= own.accuracy[task.name] | read_layers.accuracy[task.name]
            unseen.setdefault(task.level, {})[task.name] = row
    controls = {
        kind: [
            float(np.mean(tasks[n]["accuracy"][kind]))
            for n in encoded.names
            if kind in tasks[n]["accuracy"]
        ]
        for kind in schema.CONTROLS
    }
    controls = {k: v for k, v in controls.items() if v}
    steps: dict[str, dict[int, list[float]]] = {}
    for method, count in sample.step_requests(world, encoded):
        key = f"{method}/{count}"
        values = [
            float(np.mean(r["accuracy"][key])) for r in tasks.values() if key in r["accuracy"]
        ]
        steps.setdefault(method, {})[count] = values
    extra = {
        k: audit[k]
        for k in (
            "soup_distance",
            "effective_rank_real",
            "effective_rank_generated",
            "latent_effective_rank",
        )
    }
    extra["prior_error"] = audit["kernels"]["prior_error"]
    extra["ridge_error"] = audit["kernels"]["ridge_error"]
    report = build.build(
        config=dataclasses.asdict(config) | {"command": command},
        environment=environment(),
        seen=seen,
        confusion_labels=encoded.names,
        confusion_matrix=audit["confusion"],
        confusion_diagonal=audit["confusion_diagonal"],
        condition_controls=controls,
        novelty_ratio=audit["novelty_ratio"],
        diversity_ratio=audit["diversity_ratio"],
        unseen=unseen,
        steps=steps,
        curves=curves(workdir, config),
        times=times,
        audit=extra,
        notes=notes(config, audit, others)
        + episodes_note(own)
        + layered_note(read_layers)
        + classes_note(world),
        more_steps=continued(world, evaluated, more),
        seed=config.seed,
    )
    schema.write(workdir / "report.json", report)
    shutil.copyfile(evaluated["arrays"], workdir / "arrays.npz")
    html.write(workdir / "report.html", report, report_arrays.load(workdir / "arrays.npz"))
    return report


def continued(
    world: World, evaluated: Mapping[str, Any], more: more_steps.MoreSteps
) -> dict[str, Any] | None:
    """The section `more_steps`; None where it was not measured."""
    if not more.accuracy:
        return None
    levels: dict[str, dict[str, Any]] = {}
    for name, row in more.accuracy.items():
        levels.setdefault(world.task(name).level, {})[name] = row
    trained = {
        n: float(np.mean(evaluated["tasks"][n]["accuracy"]["trained"])) for n in more.accuracy
    }
    return report_steps.section(more.steps, levels, trained, more.full.accuracy)


def notes(config: Config, audit: Mapping[str, Any], others: rivals.Rivals) -> list[str]:
    """Plain sentences under the claims."""
    frozen, lora, prior = others.frozen, others.lora, others.discriminant
    kernels = audit["kernels"]
    return [
        f"Kernel ridge, condition to adapter: {kernels['ridge']}, chosen with its penalty by"
        f" leave-one-task-out error on the seen tasks ({kernels['ridge_error']:.2f} of the mean"
        " adapter's error).",
        f"Rivals see the generator's {config.examples} texts per class; chosen on the seen tasks'"
        f" validation texts: {frozen.neighbours} neighbours, penalty {frozen.penalty:g} of logistic"
        f" regression ({frozen.penalty_full:g} on all texts), LoRA for"
        f" {(lora.stop + 1) * few_shot.steps_per_look(config)} steps at"
        f" {lora.factor * config.zoo_lr:g}, discriminant with shrinkage {prior.shrinkage:g} and"
        f" gain {prior.gain:g}.",
        f"Prior mean of the generator: {config.prior}; task loss over the pool"
        f" '{config.task_pool}' for {config.task_steps} steps of {config.task_batch} tasks x"
        f" {config.task_rows} texts.",
        "The paper's DDPM runs at reduced U-Net widths (settings pdiff_*), so its figures are those"
        " of a small faithful copy, not of the published size.",
        "The per-task normalisation of the paper gives the decoder the task (see"
        " pdiff_task_norm): its accuracy does not show that the condition was read.",
    ]


def episodes_note(results: episodes.Results) -> list[str]:
    """A sentence about the episodic discriminant, its training and its controls."""
    text = f"Episodic discriminant: {results.steps} steps on the seen tasks"
    if results.validation:
        text += (
            ", so many because they were best on the corpora left out of training (accuracy of"
            f" each round: {', '.join(f'{100 * x:.1f} %' for x in results.validation)})"
        )
    if results.controls:
        shown = {"shuffled": "labels of the examples shuffled", "random": "shared factors random"}
        said = [f"{shown[key]} {100 * value:.1f} %" for key, value in results.controls.items()]
        text += f". Controls: {', '.join(said)}"
    return [f"{text}."]


def layered_note(results: layered_stage.Results) -> list[str]:
    """A sentence about the layered discriminant and its controls."""
    if not results.controls:
        return []
    shown = {"shuffled": "labels of the examples shuffled", "no_memory": "no class remembered"}
    said = [f"{shown[key]} {100 * value:.1f} %" for key, value in results.controls.items()]
    return [f"Layered discriminant: nothing is trained. Controls: {', '.join(said)}."]


def classes_note(world: World) -> list[str]:
    """A sentence about chance where not all tasks have two classes."""
    if world.classes == FEWEST:
        return []
    count = sum(task.classes > FEWEST for task in world.tasks)
    return [
        f"{count} of the {len(world.tasks)} tasks have more than two classes, at most"
        f" {world.classes}; the chance level of C classes is 1/C. Means are over all tasks of a"
        " level, whatever their classes."
    ]


def describe(report: Mapping[str, Any]) -> str:
    """The report in one line."""
    return f"of {len(report['claims'])} targets {words.verdicts(report)}"


STAGE = Stage(
    name="report",
    inputs=("data", "codec", "rivals", "evaluate", "more_steps", "episodes", "layered"),
    unit="page",
    read=read,
    describe=describe,
    kept=False,
)

"""Adapters for tasks the zoo never saw, on a finished workdir: `--task_dir` with
`--stage=sample,evaluate`.

Each task gets `--samples` adapters generated from its descriptions and K training examples a class
(no training), scored on its test split beside the base model and the baselines, and saved as Orbax
and PEFT under `<workdir>/user/<task>/`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.config import Config
from experiments.data import user
from experiments.progress import Progress
from experiments.stages import base_model, codec, conditions, judge, rivals, sample
from experiments.stages.codec import Coded
from experiments.stages.denoiser import Trained
from experiments.stages.evaluate import base_tokens
from experiments.stages.world import SPLITS, Rows, World, make_heads
from experiments.workdir import StageError, write_json


def extend(world: World, config: Config, cache: Path | None) -> World:
    """The same base with the user's tasks instead of the zoo's (their texts are encoded here)."""
    tasks = tuple(user.tasks(config.task_dir))
    if not tasks:
        raise StageError(f"--task_dir={config.task_dir}: holds no task folder")
    base = base_model.load(config, cache)
    texts: dict[str, int] = {}
    rows = {}
    for task in tasks:
        found = user.data(task.source.partition(":")[2])
        for split in SPLITS:
            words, labels = getattr(found, split)
            index = [texts.setdefault(w, len(texts)) for w in words]
            rows[task.name, split] = Rows(np.asarray(index, np.int32), np.asarray(labels, np.int32))
    parts = [
        base_model.states(base, list(texts)[i : i + 64], config, 64)
        for i in range(0, len(texts), 64)
    ]
    hidden, mask, embedding = (np.concatenate(p) for p in zip(*parts, strict=True))
    phrases = sorted(
        {w for t in tasks for w in (*t.class_descriptions, *t.class_names)}
        | {w for t in tasks for side in t.paraphrases for w in side}
    )
    text = dict(zip(phrases, base_model.embed_texts(base, phrases, config.max_length), strict=True))
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


def run(
    world: World, config: Config, coded: Coded, trained: Trained, workdir: Path, cache: Path | None
) -> dict[str, Any]:
    """Generate, score and save; returns {task: {method: {mean, std, n}}} (also written as JSON)."""
    fit = rivals.fit(world, coded, trained)
    mine = extend(world, config, cache)
    folder = workdir / "user"
    call = sample.our_sampler(config, coded, trained, config.sampler, config.sample_steps)
    out: dict[str, Any] = {}
    with Progress(workdir, "user tasks", len(mine.tasks), "task") as bar:
        for task in mine.tasks:
            asked = [
                sample.Request(task.name, "generated", task.name, k) for k in range(config.samples)
            ]
            arrays = sample.inputs(mine, trained, asked)
            made = np.asarray(call(trained.params, trained.fixed, *arrays))
            raw = jnp.asarray(conditions.canonical(mine, [task.name]))
            found = rivals.predict(fit, conditions.scaled(trained.fixed.stats, raw)[0])
            table = {"base": base_tokens(coded), "generated": made}
            table |= {name: tokens[None] for name, tokens in found.items()}
            out[task.name] = {}
            for name, tokens in table.items():
                hits = judge.correct(mine, coded, task.name, tokens).mean(1)
                std = float(hits.std(ddof=1)) if len(hits) > 1 else 0.0
                cell = {"mean": float(hits.mean()), "std": std, "n": len(hits)}
                out[task.name][name] = cell
            target = folder / task.name
            bank = codec.bank(coded, judge.unpack(coded, jnp.asarray(made)))
            jl.io.save_adapter(target / "orbax", bank, overwrite=True)
            first = jax.tree.map(lambda x: x[0], judge.unpack(coded, jnp.asarray(made)))
            adapter = coded.template.replace(trainable=first)
            sample.export_peft(mine, adapter, target / "peft", task.description)
            write_json(target / "scores.json", out[task.name])
            bar.step(1)
    write_json(folder / "scores.json", out)
    write_json(folder / "settings.json", dataclasses.asdict(config))
    return out

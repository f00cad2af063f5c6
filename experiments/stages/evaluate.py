"""Stage `evaluate`: every adapter on its task's test rows, and the audits in delta space.

Figures are means over all samples and seeds, never the best of n. Work is kept per task, so a
killed evaluation resumes where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.progress import Progress
from experiments.report import arrays as report_arrays
from experiments.stages import codec, conditions, judge, rivals, sample
from experiments.stages.codec import Coded
from experiments.stages.denoiser import Trained
from experiments.stages.sample import Draws
from experiments.stages.world import World
from experiments.stages.zoo import Zoo
from experiments.workdir import Stage, write_json
from jlora import algebra
from jlora.generation.audit import metrics as audit
from jlora.generation.diffusion import dispersive

PyTree = Any


def final_tokens(world: World, coded: Coded, zoo: Zoo, task: str) -> tuple[np.ndarray, list[int]]:
    """([seeds, T, D] tokens of a task's trained adapters at their last step, their seeds)."""
    where = zoo.of(task, range(world.config.zoo_seeds + 1))
    last = jax.tree.map(lambda x: jnp.asarray(x[where, -1]), zoo.trainable)
    return np.asarray(codec.to_tokens(coded, world.config, last)), [zoo.runs[i].seed for i in where]


def base_tokens(coded: Coded) -> np.ndarray:
    """[1, T, D] of a fresh adapter: the base model itself."""
    fresh = jax.tree.map(jnp.zeros_like, coded.template.trainable)
    one = codec.tokens.tokenise(coded.spec, fresh)
    return np.asarray(one)[None]


def candidates(
    world: World,
    coded: Coded,
    zoo: Zoo,
    trained: Trained,
    draws: Draws,
    fit: rivals.Rivals,
    task: str,
) -> dict[str, np.ndarray]:
    """{method: tokens [m, T, D]} to be judged on one task."""
    own, _ = final_tokens(world, coded, zoo, task)
    raw = jnp.asarray(conditions.canonical(world, [task]))
    found = rivals.predict(fit, conditions.scaled(trained.fixed.stats, raw)[0])
    out = {"base": base_tokens(coded), "trained": own, "generated": draws.of(task, "generated")}
    if task in coded.names:
        out["mean_adapter"] = found["mean_adapter"][None]
        out["soup"] = fit.soups[coded.names.index(task)][None]
        kinds = sorted({k for t, k in draws.rows if t == task} - {"generated"})
        out |= {kind: draws.of(task, kind) for kind in kinds}
        return out
    out |= {name: tokens[None] for name, tokens in found.items()}
    multi = jax.tree.map(lambda x: jnp.asarray(x)[None], zoo.multitask)
    out["multitask"] = np.asarray(codec.to_tokens(coded, world.config, multi))
    out["span"] = rivals.project(coded, own[-1])[None]
    return out


def grams(coded: Coded, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """Inner products of deltas [n, n] (or [n, m]) of canonical tokens, without any dense delta."""

    def bank(x: np.ndarray):
        return codec.bank(coded, judge.unpack(coded, jnp.asarray(x)))

    other = None if right is None else bank(right)
    return np.asarray(algebra.gram(bank(left), other))


def run(
    world: World, zoo: Zoo, coded: Coded, trained: Trained, draws: Draws, workdir: Path
) -> dict[str, Any]:
    """All figures: {"accuracy": {task: {method: [..]}}, "wrong": ..., "audit": ...}."""
    stage = Stage(workdir, "evaluate", world.config.key("evaluate"))
    if not stage.done:
        folder = stage.open()
        fit = rivals.fit(world, coded, trained)
        (folder / "tasks").mkdir(exist_ok=True)
        with Progress(workdir, "evaluate", len(world.tasks), "task") as bar:
            for task in world.tasks:
                target = folder / "tasks" / f"{task.name}.json"
                if not target.is_file():
                    found = candidates(world, coded, zoo, trained, draws, fit, task.name)
                    scores, wrong = judge_all(world, coded, task.name, found)
                    write_json(target, {"accuracy": scores, "overlap": wrong})
                bar.step(1)
        info = audits(world, coded, zoo, trained, draws, fit, folder)
        info["kernels"] = {
            "ridge": str(fit.kernel), "ridge_error": fit.error, "prior": str(trained.kernel),
            "prior_error": trained.choice.error, "temperature": fit.temperature,
        }  # fmt: skip
        write_json(folder / "audit.json", info)
        stage.commit()
    stage.verify()
    folder = stage.path
    tasks = {}
    for task in world.tasks:
        text = (folder / "tasks" / f"{task.name}.json").read_text(encoding="utf-8")
        tasks[task.name] = json.loads(text)
    audit_text = (folder / "audit.json").read_text(encoding="utf-8")
    return {"tasks": tasks, "audit": json.loads(audit_text), "arrays": folder / "arrays.npz"}


def judge_all(
    world: World, coded: Coded, task: str, found: dict[str, np.ndarray]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Accuracies of every method's adapters, and how far mistakes overlap with trained ones'."""
    names = list(found)
    stacked = np.concatenate([found[n] for n in names])
    hits = judge.correct(world, coded, task, stacked)
    scores, start, by = {}, 0, {}
    for name in names:
        part = hits[start : start + len(found[name])]
        scores[name] = [float(x) for x in part.mean(1)]
        by[name] = ~part
        start += len(part)
    overlap = {}
    for name in ("generated", "trained"):
        wrong, own = by[name], by["trained"]
        both = (wrong[:, None] & own[None]).sum(-1) / np.maximum(
            (wrong[:, None] | own[None]).sum(-1), 1
        )
        if name == "trained":
            np.fill_diagonal(both, 0)
        overlap[name] = [float(x) for x in both.max(1)]
    return scores, overlap


def audits(
    world: World,
    coded: Coded,
    zoo: Zoo,
    trained: Trained,
    draws: Draws,
    fit: rivals.Rivals,
    folder: Path,
) -> dict[str, Any]:
    """Confusion, novelty, diversity, effective ranks; writes arrays.npz for the plots."""
    config, names = world.config, coded.names
    count = min(config.samples, 10)
    made = np.concatenate([draws.of(n, "generated")[:count] for n in names])
    made_task = np.repeat(np.arange(len(names)), count)
    real, real_task, real_seed, held, held_task = [], [], [], [], []
    for k, name in enumerate(names):
        tokens, seeds = final_tokens(world, coded, zoo, name)
        for token, seed in zip(tokens, seeds, strict=True):
            if seed < config.zoo_seeds:
                real.append(token)
                real_task.append(k)
                real_seed.append(seed)
            else:
                held.append(token)
                held_task.append(k)
    everything = np.stack([*real, *made, *held])
    gram = grams(coded, everything)
    norms = np.diag(gram)
    r, m = len(real), len(made)
    i_real, i_made, i_held = np.arange(r), np.arange(r, r + m), np.arange(r + m, len(everything))

    def near(rows):
        cross, own, other = gram[np.ix_(rows, i_real)], norms[rows], norms[i_real]
        parts = (jnp.asarray(x) for x in (cross, own, other))
        return np.asarray(audit.nearest_distance(*parts)[0])

    cross = grams(coded, made, fit.soups)
    own = np.asarray(
        audit.nearest_soup_confusion(
            jnp.asarray(cross), jnp.asarray(norms[i_made]),
            jnp.asarray(np.diag(grams(coded, fit.soups))), jnp.asarray(made_task),
        ).matrix
    )  # fmt: skip
    square = np.diag(grams(coded, fit.soups))
    distance = norms[i_made][:, None] + square[None] - 2 * cross
    diagonal = float((distance.argmin(1) == made_task).mean())
    away = np.asarray(
        audit.soup_distance(
            jnp.asarray(cross[np.arange(m), made_task]), jnp.asarray(norms[i_made]),
            jnp.asarray(square[made_task]),
        )
    )  # fmt: skip
    wide = jnp.asarray(gram)
    diversity = audit.diversity_ratio(
        wide[np.ix_(i_made, i_made)], jnp.asarray(made_task),
        wide[np.ix_(i_real, i_real)], jnp.asarray(real_task), jnp.asarray(real_seed),
    )  # fmt: skip
    nn_made, nn_held = near(i_made), near(i_held)
    labels = np.concatenate([real_task, made_task, held_task]).astype(np.int32)
    kinds = np.repeat(
        [report_arrays.TRAINED, report_arrays.GENERATED, report_arrays.HELD_OUT], [r, m, len(held)]
    ).astype(np.int32)
    path = trajectory(world, coded, trained)
    report_arrays.save(
        folder / "arrays.npz",
        gram=gram,
        task=labels,
        kind=kinds,
        names=np.asarray(names),
        trajectory_cross=np.stack([grams(coded, p, everything) for p in path]),
        trajectory_task=np.arange(len(path), dtype=np.int32),
        nn_generated=nn_made,
        nn_held_out=nn_held,
    )
    return {
        "confusion": own.tolist(),
        "confusion_diagonal": diagonal,
        "novelty_ratio": float(audit.novelty_ratio(jnp.asarray(nn_made), jnp.asarray(nn_held))),
        "diversity_ratio": float(diversity),
        "soup_distance": float(np.median(away)),
        "effective_rank_real": float(audit.effective_rank(wide[np.ix_(i_real, i_real)])),
        "effective_rank_generated": float(audit.effective_rank(wide[np.ix_(i_made, i_made)])),
        "latent_effective_rank": float(dispersive.effective_rank(trained.fixed.residual)),
    }


def trajectory(world: World, coded: Coded, trained: Trained) -> np.ndarray:
    """[1, steps + 1, T, D]: what one denoising run decodes to at each of its steps."""
    config = world.config
    request = sample.Request(coded.names[0], "generated", coded.names[0], 0)
    call = sample.our_sampler(
        config, coded, trained, config.sampler, config.sample_steps, path=True
    )
    return np.asarray(
        call(trained.params, trained.fixed, *sample.inputs(world, trained, [request]))
    )


def describe(found: dict[str, Any]) -> str:
    """The stage in a line."""
    rows = [task["accuracy"] for task in found["tasks"].values() if "soup" in task["accuracy"]]
    shown = ", ".join(
        f"{key} {100 * np.mean([np.mean(row[key]) for row in rows]):.1f} %"
        for key in ("base", "trained", "generated")
    )
    count = sum(len(v) for task in found["tasks"].values() for v in task["accuracy"].values())
    return f"{count} adapters judged; on {len(rows)} seen tasks: {shown}"

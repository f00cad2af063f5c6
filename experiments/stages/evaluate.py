"""Stage `evaluate`: every adapter on its task's test rows, and the audits in delta space.

Figures are means over all samples and seeds, never the best of n. Work is kept per task, so a
killed evaluation resumes where it stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.report import arrays as report_arrays
from experiments.stages import accuracy, baselines, codec, conditions, sample
from experiments.stages.codec import Encoded
from experiments.stages.denoiser import Trained
from experiments.stages.sample import Samples
from experiments.stages.world import World
from experiments.stages.zoo import Zoo
from experiments.workdir import REDO, read_json, write_json
from jlora import algebra
from jlora.generation.audit import metrics as audit
from jlora.generation.diffusion import dispersive

PyTree = Any


def final_tokens(
    world: World, encoded: Encoded, zoo: Zoo, task: str
) -> tuple[np.ndarray, list[int]]:
    """([seeds, T, D] tokens of a task's trained adapters at their last step, their seeds)."""
    where = zoo.of(task, range(world.config.zoo_seeds + 1))
    last = jax.tree.map(lambda x: jnp.asarray(x[where, -1]), zoo.trainable)
    return np.asarray(codec.to_tokens(encoded, world.config, last)), [
        zoo.runs[i].seed for i in where
    ]


def base_tokens(encoded: Encoded) -> np.ndarray:
    """[1, T, D] of a fresh adapter: the base model itself."""
    fresh = jax.tree.map(jnp.zeros_like, encoded.template.trainable)
    one = codec.tokens.tokenise(encoded.spec, fresh)
    return np.asarray(one)[None]


def candidates(
    world: World,
    encoded: Encoded,
    zoo: Zoo,
    trained: Trained,
    samples: Samples,
    fit: baselines.Baselines,
    task: str,
) -> dict[str, np.ndarray]:
    """{method: tokens [m, T, D]} to be evaluated on one task."""
    own, _ = final_tokens(world, encoded, zoo, task)
    raw = jnp.asarray(conditions.canonical(world, [task]))
    predicted = baselines.predict(fit, conditions.scaled(trained.fixed.stats, raw)[0])
    out = {"base": base_tokens(encoded), "trained": own, "generated": samples.of(task, "generated")}
    if task in encoded.names:
        out["mean_adapter"] = predicted["mean_adapter"][None]
        out["soup"] = fit.soups[encoded.names.index(task)][None]
        kinds = sorted({k for t, k in samples.rows if t == task} - {"generated"})
        out |= {kind: samples.of(task, kind) for kind in kinds}
        return out
    out |= {name: tokens[None] for name, tokens in predicted.items()}
    multi = jax.tree.map(lambda x: jnp.asarray(x)[None], zoo.multitask)
    out["multitask"] = np.asarray(codec.to_tokens(encoded, world.config, multi))
    out["span"] = baselines.project(encoded, own[-1])[None]
    return out


def grams(encoded: Encoded, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """Inner products of deltas [n, n] (or [n, m]) of canonical tokens, without any dense delta."""

    def bank(x: np.ndarray):
        return codec.bank(encoded, accuracy.unpack(encoded, jnp.asarray(x)))

    other = None if right is None else bank(right)
    return np.asarray(algebra.gram(bank(left), other))


def pieces(context: Context, prepared: None) -> list[Piece]:
    """A piece per task, and the audits."""
    products = [context.products[name] for name in STAGE.inputs]
    world, _, encoded, trained, _ = products
    fit = baselines.fit(world, encoded, trained)
    out = [
        Piece(f"tasks/{task.name}.json", 1, functools.partial(_evaluate, products, fit, task.name))
        for task in world.tasks
    ]
    return [*out, Piece("audit.json", 1, functools.partial(_audit, products, fit))]


def _evaluate(
    products: Sequence[Any], fit: baselines.Baselines, task: str, folder: Path, bar: Progress
) -> None:
    world, zoo, encoded, trained, samples = products
    adapters = candidates(world, encoded, zoo, trained, samples, fit, task)
    scores, wrong = score(world, encoded, task, adapters)
    (folder / "tasks").mkdir(exist_ok=True)
    write_json(folder / "tasks" / f"{task}.json", {"accuracy": scores, "overlap": wrong})
    bar.step(1)


def _audit(products: Sequence[Any], fit: baselines.Baselines, folder: Path, bar: Progress) -> None:
    world, zoo, encoded, trained, samples = products
    info = audits(world, encoded, zoo, trained, samples, fit, folder)
    info["kernels"] = {
        "ridge": str(fit.kernel), "ridge_error": fit.error, "prior": str(trained.kernel),
        "prior_error": trained.choice.error, "temperature": fit.temperature,
    }  # fmt: skip
    write_json(folder / "audit.json", info)
    bar.step(1)


def read(context: Context, prepared: None, done: Done) -> dict[str, Any]:
    """All figures: {"tasks": {task: {"accuracy", "overlap"}}, "audit": ..., "arrays": its file}."""
    tasks = {}
    for task in context.products["data"].tasks:
        tasks[task.name] = read_json(done.path / "tasks" / f"{task.name}.json", dict, REDO)
    audited = read_json(done.path / "audit.json", dict, REDO)
    return {"tasks": tasks, "audit": audited, "arrays": done.path / "arrays.npz"}


def score(
    world: World, encoded: Encoded, task: str, adapters: dict[str, np.ndarray]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Accuracies of every method's adapters, and how far mistakes overlap with trained ones'."""
    names = list(adapters)
    stacked = np.concatenate([adapters[n] for n in names])
    hits = accuracy.correct(world, encoded, task, stacked)
    scores, start, by = {}, 0, {}
    for name in names:
        part = hits[start : start + len(adapters[name])]
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
    encoded: Encoded,
    zoo: Zoo,
    trained: Trained,
    samples: Samples,
    fit: baselines.Baselines,
    folder: Path,
) -> dict[str, Any]:
    """Confusion, novelty, diversity, effective ranks; writes arrays.npz for the plots."""
    config, names = world.config, encoded.names
    count = min(config.samples, 10)
    generated = np.concatenate([samples.of(n, "generated")[:count] for n in names])
    generated_task = np.repeat(np.arange(len(names)), count)
    real, real_task, real_seed, held, held_task = [], [], [], [], []
    for k, name in enumerate(names):
        tokens, seeds = final_tokens(world, encoded, zoo, name)
        for token, seed in zip(tokens, seeds, strict=True):
            if seed < config.zoo_seeds:
                real.append(token)
                real_task.append(k)
                real_seed.append(seed)
            else:
                held.append(token)
                held_task.append(k)
    everything = np.stack([*real, *generated, *held])
    gram = grams(encoded, everything)
    norms = np.diag(gram)
    r, m = len(real), len(generated)
    i_real, i_generated, i_held = (
        np.arange(r),
        np.arange(r, r + m),
        np.arange(r + m, len(everything)),
    )

    def near(rows):
        cross, own, other = gram[np.ix_(rows, i_real)], norms[rows], norms[i_real]
        parts = (jnp.asarray(x) for x in (cross, own, other))
        return np.asarray(audit.nearest_distance(*parts)[0])

    cross = grams(encoded, generated, fit.soups)
    own = np.asarray(
        audit.nearest_soup_confusion(
            jnp.asarray(cross), jnp.asarray(norms[i_generated]),
            jnp.asarray(np.diag(grams(encoded, fit.soups))), jnp.asarray(generated_task),
        ).matrix
    )  # fmt: skip
    square = np.diag(grams(encoded, fit.soups))
    distance = norms[i_generated][:, None] + square[None] - 2 * cross
    diagonal = float((distance.argmin(1) == generated_task).mean())
    away = np.asarray(
        audit.soup_distance(
            jnp.asarray(cross[np.arange(m), generated_task]), jnp.asarray(norms[i_generated]),
            jnp.asarray(square[generated_task]),
        )
    )  # fmt: skip
    wide = jnp.asarray(gram)
    diversity = audit.diversity_ratio(
        wide[np.ix_(i_generated, i_generated)], jnp.asarray(generated_task),
        wide[np.ix_(i_real, i_real)], jnp.asarray(real_task), jnp.asarray(real_seed),
    )  # fmt: skip
    nn_generated, nn_held = near(i_generated), near(i_held)
    labels = np.concatenate([real_task, generated_task, held_task]).astype(np.int32)
    kinds = np.repeat(
        [report_arrays.TRAINED, report_arrays.GENERATED, report_arrays.HELD_OUT], [r, m, len(held)]
    ).astype(np.int32)
    path = trajectory(world, encoded, trained)
    report_arrays.save(
        folder / "arrays.npz",
        gram=gram,
        task=labels,
        kind=kinds,
        names=np.asarray(names),
        trajectory_cross=np.stack([grams(encoded, p, everything) for p in path]),
        trajectory_task=np.arange(len(path), dtype=np.int32),
        nn_generated=nn_generated,
        nn_held_out=nn_held,
    )
    return {
        "confusion": own.tolist(),
        "confusion_diagonal": diagonal,
        "novelty_ratio": float(
            audit.novelty_ratio(jnp.asarray(nn_generated), jnp.asarray(nn_held))
        ),
        "diversity_ratio": float(diversity),
        "soup_distance": float(np.median(away)),
        "effective_rank_real": float(audit.effective_rank(wide[np.ix_(i_real, i_real)])),
        "effective_rank_generated": float(
            audit.effective_rank(wide[np.ix_(i_generated, i_generated)])
        ),
        "latent_effective_rank": float(dispersive.effective_rank(trained.fixed.residual)),
    }


def trajectory(world: World, encoded: Encoded, trained: Trained) -> np.ndarray:
    """[1, steps + 1, T, D]: what one denoising run decodes to at each of its steps."""
    config = world.config
    request = sample.Request(encoded.names[0], "generated", encoded.names[0], 0)
    call = sample.generator_sampler(
        config, encoded, trained, config.sampler, config.sample_steps, path=True
    )
    return np.asarray(
        call(trained.params, trained.fixed, *sample.inputs(world, trained, [request]))
    )


def describe(results: dict[str, Any]) -> str:
    """The result in one line."""
    rows = [task["accuracy"] for task in results["tasks"].values() if "soup" in task["accuracy"]]
    shown = ", ".join(
        f"{key} {100 * np.mean([np.mean(row[key]) for row in rows]):.1f} %"
        for key in ("base", "trained", "generated")
    )
    count = sum(len(v) for task in results["tasks"].values() for v in task["accuracy"].values())
    return f"{count} adapters evaluated; on {len(rows)} seen tasks: {shown}"


STAGE = Stage(
    name="evaluate",
    inputs=("data", "zoo", "codec", "denoiser", "sample"),
    unit="part",
    pieces=pieces,
    read=read,
    describe=describe,
)

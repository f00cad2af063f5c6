"""What a finished run offers for tasks that it never saw: adapters and rivals, and their folds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.pipeline import Context
from experiments.progress import Progress
from experiments.report import names
from experiments.stages import (
    accuracy,
    baselines,
    codec,
    conditions,
    cross_validation,
    discriminants,
    few_shot,
    one_against_rest,
    rivals,
    sample,
)
from experiments.stages.codec import Encoded
from experiments.stages.cross_validation import Verdict
from experiments.stages.denoiser import Trained
from experiments.stages.evaluate import base_tokens
from experiments.stages.rivals import Rivals
from experiments.stages.world import Rows, World, condition, padded
from jlora.generation.generators.discriminant import Discriminant

PyTree = Any
SAMPLES = 3  # generated adapters per fold of the cross-validation


class Kit(NamedTuple):
    """What a finished run gives for tasks that it never saw."""

    encoded: Encoded
    trained: Trained
    fit: baselines.Baselines
    rivals: Rivals
    prior: Discriminant
    call: Any  # the generator's sampler
    fixed: dict[str, np.ndarray]  # method -> tokens [1, T, D] of what knows no condition


def kit(context: Context) -> Kit:
    """From the products of a finished run."""
    config = context.config
    world, zoo, encoded, rivals_product, trained = (
        context.products[name] for name in ("data", "zoo", "codec", "rivals", "denoiser")
    )
    fit = baselines.fit(world, encoded, trained)
    multi = jax.tree.map(lambda x: jnp.asarray(x)[None], zoo.multitask)
    fixed = {
        "base": base_tokens(encoded),
        "multitask": np.asarray(codec.to_tokens(encoded, config, multi)),
        "mean_adapter": fit.soups.mean(0)[None],
    }
    prior = discriminants.fit(world, rivals_product.features, rivals_product.discriminant)
    call = sample.generator_sampler(config, encoded, trained, config.sampler, config.sample_steps)
    return Kit(encoded, trained, fit, rivals_product, prior, call, fixed)


def adapters(of: Kit, mine: World, task: str) -> dict[str, np.ndarray]:
    """{method: tokens} of what reads a condition; `samples` generated ones.

    Args:
      mine: its training texts are the examples (`conditions.of_examples`).

    Returns:
      Tokens [m, T, D], or [m, C, T, D] where each class has an adapter (`one_against_rest`).
    """
    classes = of.trained.fixed.stats.mean.shape[0] // 2  # that a condition of the generator holds
    one = mine.task(task)
    if one.classes <= classes:
        return _of_condition(of, mine, task, padded(condition(mine, one, None), classes))
    rest = padded(one_against_rest.conditions(mine, one), classes)
    each = [_of_condition(of, mine, f"{task}/{c}", raw) for c, raw in enumerate(rest)]
    return {name: np.stack([own[name] for own in each], 1) for name in each[0]}


def _of_condition(of: Kit, mine: World, name: str, raw: np.ndarray) -> dict[str, np.ndarray]:
    """{method: tokens [m, T, D]} of a condition [2 C, E]."""
    asked = [sample.Request(name, "generated", name, k) for k in range(mine.config.samples)]
    cond = conditions.scaled(of.trained.fixed.stats, jnp.asarray(raw))
    keys = jnp.stack([sample.key_of(mine.config, r) for r in asked])
    many = jnp.broadcast_to(cond[None], (len(asked), *cond.shape))
    null = jnp.zeros(len(asked), bool)
    out = {"generated": np.asarray(of.call(of.trained.params, of.trained.fixed, keys, many, null))}
    predicted = baselines.predict(of.fit, cond)
    return out | {name: x[None] for name, x in predicted.items() if name not in of.fixed}


def hits(mine: World, encoded: Encoded, task: str, tokens: np.ndarray) -> np.ndarray:
    """bool [m, rows]: which test rows are right by adapters [m, T, D], or [m, C, T, D]."""
    if tokens.ndim == 3:
        return accuracy.correct(mine, encoded, task, tokens)
    return one_against_rest.correct(mine, encoded, task, tokens)


def cross_validate(of: Kit, mine: World, task: str, lora: Sequence[PyTree]) -> Verdict | None:
    """Every method on each fold of the task's K examples.

    Args:
      lora: of each fold, the adapter trained on its examples.
    """
    few = conditions.examples(mine, task)
    parts = cross_validation.folds(few.label, mine.config.data_seed)
    if not parts:
        return None
    scores = {key: np.zeros(len(few.label)) for key in ("generated", *names.rivals(names.USER))}

    def right(tokens: np.ndarray, rows: Rows) -> np.ndarray:
        there = mine._replace(rows={**mine.rows, (task, "test"): rows})
        return hits(there, of.encoded, task, tokens).mean(0)

    for name, tokens in of.fixed.items():
        scores[name] = right(tokens, few)
    for part, trained in zip(parts, lora, strict=True):
        kept, hidden = (cross_validation.taken(few, where) for where in part)
        there = mine._replace(rows={**mine.rows, (task, "train"): kept})
        for name, tokens in adapters(of, there, task).items():
            scores[name][part.hidden] = right(tokens[:SAMPLES], hidden)
        for name, classify in rivals.classifiers(of.rivals.frozen).items():
            scores[name][part.hidden] = rivals.right(mine, classify, kept, hidden)
        own = discriminants.adapter(mine, of.prior, task, discriminants.means(mine, [kept])[0])
        scores["discriminant"][part.hidden] = discriminants.right(mine, task, own, hidden)
        scores["lora_k"][part.hidden] = few_shot.hits(mine, of.encoded, task, hidden, trained)[0]
    return cross_validation.verdict(scores, seed=mine.config.seed)


def train_few(of: Kit, mine: World, workdir: Path) -> dict[str, list[PyTree]]:
    """{task: adapters trained on its K examples, and on those of each fold}."""
    sets: dict[str, list[few_shot.Set]] = {}
    for task in mine.tasks:
        few = conditions.examples(mine, task.name)
        parts = cross_validation.folds(few.label, mine.config.data_seed)
        every = [few, *(cross_validation.taken(few, part.kept) for part in parts)]
        sets[task.name] = [few_shot.Set(task.name, rows) for rows in every]
    flat = [one for each in sets.values() for one in each]
    chosen, size = of.rivals.lora, few_shot.chunk_size(mine, len(flat))
    with Progress(workdir, "user few", len(flat), "run") as bar:
        factors = [chosen.factor] * len(flat)
        snapshot = few_shot.train(mine, flat, factors, size, chosen.stop + 1, bar)[-1]
    one = [jax.tree.map(lambda x, k=k: x[k : k + 1], snapshot) for k in range(len(flat))]
    out: dict[str, list[PyTree]] = {name: [] for name in sets}
    for trained, chosen_set in zip(one, flat, strict=True):
        out[chosen_set.task].append(trained)
    return out


def rival_hits(
    of: Kit, mine: World, task: str, trained: PyTree
) -> tuple[jl.Adapter, dict[str, np.ndarray]]:
    """The discriminant's adapter, and {method: bool [1, texts]} of what sees its texts alone.

    Args:
      trained: bank of one, the adapter trained on the K examples.
    """
    few, rows = conditions.examples(mine, task), mine.rows[task, "test"]
    frozen = of.rivals.frozen
    out = {
        name: rivals.right(mine, classify, few, rows)[None]
        for name, classify in rivals.classifiers(frozen).items()
    }
    out["logreg_full"] = rivals.full(mine, frozen, task, rows)[None]
    out["lora_k"] = few_shot.hits(mine, of.encoded, task, rows, trained)
    own = discriminants.adapter(mine, of.prior, task, discriminants.means(mine, [few])[0])
    out["discriminant"] = discriminants.right(mine, task, own, rows)[None]
    return own, out

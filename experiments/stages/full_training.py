"""Full fine-tuning of the adapted layers on all training texts of a task: no adapter at all.

The recipe is the zoo's (batch, Adam with warm-up and cosine decay, clipped gradients), every
parameter of the upper layers learns, the head stays frozen. The learning rate is that of the best
mean accuracy on validation texts of some seen tasks, trained in the same way.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.progress import Progress
from experiments.stages import accuracy, few_shot, zoo_training
from experiments.stages.world import World, classifier
from experiments.stages.zoo_training import Recipe
from jlora.models import encoder

PyTree = Any
RATES = (1e-4, 3e-4, 1e-3)  # tried; the zoo's adapters learn at ten times these


class Results(NamedTuple):
    """What full fine-tuning reached."""

    accuracy: dict[str, float]  # held-out task -> test accuracy; empty: not measured
    rate: float | None  # the learning rate that the seen tasks chose


def choosers(names: Sequence[str]) -> list[str]:
    """Seen tasks that choose the rate, spread over the list."""
    return list(names[:: max(1, len(names) // few_shot.TASKS)][: few_shot.TASKS])


def runs(held: Sequence[str]) -> int:
    """How many runs there are: for a progress bar."""
    return len(RATES) * few_shot.TASKS + len(held)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fitted(
    model: encoder.EncoderConfig,
    plan: Recipe,
    rate: jax.Array,
    upper: PyTree,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    rows: tuple[jax.Array, jax.Array, jax.Array],
) -> PyTree:
    """The upper layers after `plan.steps` steps."""
    (hidden, mask, head), (table, size, number) = arrays, rows
    apply = classifier(model, plan.head_scale)
    solver = zoo_training.optimizer(plan.rate, plan.steps)

    def loss(params: PyTree, pick: jax.Array) -> jax.Array:
        text, label = table[pick, 0], table[pick, 1]
        heads = jnp.broadcast_to(head, (len(pick), *head.shape))
        logits = apply(params, hidden[text], mask[text], heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(carry: tuple[PyTree, PyTree], k: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, moments = carry
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), number), k)
        grads = jax.grad(loss)(params, jax.random.randint(key, (plan.batch,), 0, size))
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = solver.update(grads, moments, params)
        updates = jax.tree.map(lambda u: rate / jnp.float32(plan.rate) * u, updates)  # as Adam's is
        return (optax.apply_updates(params, updates), moments), None

    counts = jnp.arange(plan.steps, dtype=jnp.int32)
    return jax.lax.scan(step, (upper, solver.init(upper)), counts)[0][0]


def train(world: World, task: str, rate: float) -> PyTree:
    """The upper layers, fine-tuned on all training texts of a task."""
    config = world.config
    run = zoo_training.Run(f"{task}/full", (task,), config.seed)
    rows = zoo_training.pools(world, [run])
    number = jnp.int32(zlib.crc32(run.name.encode()) & 0x7FFFFFFF)
    plan = zoo_training.recipe(config, config.full_steps)
    arrays = (world.hidden, world.mask, jnp.asarray(world.head_of(task)))
    given = (rows.table[0], rows.sizes[0], number)
    return _fitted(world.model, plan, jnp.float32(rate), world.upper, arrays, given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(
    model: encoder.EncoderConfig, scale: float, upper: PyTree, batch: tuple[jax.Array, ...]
) -> jax.Array:
    hidden, mask, head, label = batch
    return classifier(model, scale)(upper, hidden, mask, head).argmax(-1) == label


def score(world: World, task: str, side: str, upper: PyTree) -> float:
    """Accuracy of fine-tuned layers on the "validation" or "test" texts of a task."""
    there = world._replace(rows={**world.rows, (task, "test"): world.rows[task, side]})
    static = world.model, world.config.head_scale
    hits = [
        np.asarray(_right(*static, upper, part[:4]))[: part.real]
        for part in accuracy.batches(there, task)
    ]
    return float(np.concatenate(hits).mean())


def run(world: World, seen: Sequence[str], held: Sequence[str], bar: Progress) -> Results:
    """The rate by seen tasks, then every held-out task.

    Args:
      seen: tasks of the zoo. held: those that figures are wanted of.
    """
    means = []
    for rate in RATES:
        scores = []
        for name in choosers(seen):
            scores.append(score(world, name, "validation", train(world, name, rate)))
            bar.step(1)
        means.append(np.mean(scores))
    best = RATES[int(np.argmax(means))]
    results = {}
    for name in held:
        results[name] = score(world, name, "test", train(world, name, best))
        bar.step(1)
    return Results(results, best)

r"""Audits of generated adapters: replica, interpolation or something new?

Everything works on inner products of deltas (Gram matrices), which are free of the gauge of the
factors and cost O(d r^2) an entry, never a dense delta. Symbols: g generated, i training adapters.

.. math::
    d_{NN}(g) = \min_i \frac{\|\Delta_g - \Delta_i\|}{\|\Delta_i\|}, \qquad
    \text{novelty} = \frac{\mathrm{median}_g\, d_{NN}(g)}{\mathrm{median}_s\, d_{NN}(s)},

s over REAL adapters of held-out seeds: far below 1 is replication, 1 is as new as retraining.
Diversity is the mean within-task distance between generated adapters over that between real ones of
different seeds. In float32 distances resolve to about 1e-3 of the norm (square root of rounding).

Paper: Zeng et al., Generative modeling of weights: generalization or memorization?, 2025 (IoU of
wrong predictions, distance to the nearest training point); Roy and Vetterli, 2007 (effective rank).
Deviates: distances are between deltas, not flattened factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora import numerics
from jlora.generation.baselines.soup import matmul
from jlora.system import System


class Confusion(NamedTuple):
    """Nearest-soup confusion."""

    counts: Int[Array, "tasks tasks"]  # rows: task asked for; columns: task of the nearest soup
    matrix: Float[Array, "tasks tasks"]  # rows as fractions; a row without samples is zero
    diagonal: Float[Array, ""]  # fraction of all samples that land on their own task


def distances(
    cross: Float[Array, "m n"], squared_x: Float[Array, "m"], squared_y: Float[Array, "n"]
) -> Float[Array, "m n"]:
    """Distances [m, n] from inner products ``cross`` [m, n] and squared norms [m], [n]."""
    square = squared_x[:, None] + squared_y[None, :] - 2 * cross
    return jnp.sqrt(jnp.maximum(square, 0))  # below zero is rounding


def self_distances(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Distances [n, n] among the adapters of one Gram matrix."""
    norms = jnp.diagonal(gram)
    return distances(gram, norms, norms)


def nearest_distance(
    cross: Float[Array, "m n"], squared_x: Float[Array, "m"], squared_y: Float[Array, "n"]
) -> tuple[Float[Array, "m"], Int[Array, "m"]]:
    """d_NN [m], relative to the norm of the training adapter, and which adapter [m] it is.

    Args:
      cross: [m, n] of the adapters in question with training adapters.
      squared_x: [m].
      squared_y: [n] > 0.
    """
    relative = distances(cross, squared_x, squared_y) / jnp.sqrt(squared_y)[None, :]
    return jnp.min(relative, axis=1), jnp.argmin(relative, axis=1)


def novelty_ratio(generated: Float[Array, "m"], held_out: Float[Array, "s"]) -> Float[Array, ""]:
    """median d_NN of generated adapters over median d_NN of real held-out seeds (0: replicas)."""
    return jnp.median(generated) / jnp.median(held_out)


def within_task_distance(
    gram: Float[Array, "n n"], tasks: Int[Array, "n"], runs: Int[Array, "n"]
) -> Float[Array, ""]:
    """Mean over tasks of the mean distance between adapters of one task and different runs.

    Args:
      gram: [n, n]. tasks: [n] task of each adapter.
      runs: [n] seed of each real adapter (snapshots of one run are nearly one point and do not
        count as a pair); ``jnp.arange(n)`` for generated adapters, which are all their own.

    Returns:
      scalar; each task weighs the same; NaN where no task has a pair.
    """
    pair = (tasks[:, None] == tasks[None, :]) & (runs[:, None] != runs[None, :])
    pair = pair.astype(gram.dtype)
    mates = jnp.sum(pair, axis=1)
    mine = jnp.sum(self_distances(gram) * pair, axis=1)
    same = (tasks[:, None] == tasks[None, :]).astype(gram.dtype)
    task_sum, task_pairs = matmul(same, mine), matmul(same, mates)  # of each row's own task
    size = jnp.sum(same, axis=1)
    has = (task_pairs > 0).astype(gram.dtype)
    mean = jnp.where(task_pairs > 0, task_sum / jnp.where(task_pairs > 0, task_pairs, 1), 0)
    return jnp.sum(mean / size) / jnp.sum(has / size)


def diversity_ratio(
    gram_generated: Float[Array, "m m"],
    tasks_generated: Int[Array, "m"],
    gram_real: Float[Array, "n n"],
    tasks_real: Int[Array, "n"],
    seeds_real: Int[Array, "n"],
) -> Float[Array, ""]:
    """Within-task distance gen-gen over real-real across seeds (0: one adapter over and over)."""
    alone = jnp.arange(tasks_generated.shape[0], dtype=tasks_generated.dtype)
    made = within_task_distance(gram_generated, tasks_generated, alone)
    return made / within_task_distance(gram_real, tasks_real, seeds_real)


def nearest_soup_confusion(
    cross: Float[Array, "m tasks"],
    squared_x: Float[Array, "m"],
    squared_soups: Float[Array, "tasks"],
    tasks: Int[Array, "m"],
) -> Confusion:
    """Which task's soup is each adapter closest to, against the task it was asked for.

    Args:
      cross: [m, tasks] inner products of the adapters with the soups. squared_x: [m].
      squared_soups: [tasks]. tasks: [m] index of the task asked for.
    """
    number = squared_soups.shape[0]
    found = jnp.argmin(distances(cross, squared_x, squared_soups), axis=1)
    asked = jax.nn.one_hot(tasks, number, dtype=jnp.int32)
    counts = asked.T @ jax.nn.one_hot(found, number, dtype=jnp.int32)
    rows = jnp.sum(counts, axis=1, keepdims=True)
    matrix = counts.astype(cross.dtype) / jnp.maximum(rows, 1).astype(cross.dtype)
    hits = jnp.trace(counts).astype(cross.dtype)
    return Confusion(counts, matrix, hits / jnp.sum(counts).astype(cross.dtype))


def soup_distance(
    cross_own: Float[Array, "m"], squared_x: Float[Array, "m"], squared_own: Float[Array, "m"]
) -> Float[Array, "m"]:
    """Distance to the soup of the own task over the soup's norm, all arguments [m]."""
    square = jnp.maximum(squared_x + squared_own - 2 * cross_own, 0)
    return jnp.sqrt(square / squared_own)


def affine_residual(
    weights: Float[Array, "m n"],
    gram: Float[Array, "n n"],
    cross: Float[Array, "m n"],
    squared_x: Float[Array, "m"],
) -> Float[Array, "m"]:
    """Distance to the affine hull over distance to the mean: 0 inside the hull, 1 alongside it.

    Args:
      weights: [m, n] of the projections, from ``span.affine_weights(gram, cross)``.
      gram, cross, squared_x: [n, n] of the task's training adapters, [m, n], [m]; vmap over tasks.
    """
    hull = squared_x - 2 * jnp.sum(weights * cross, axis=1)
    hull = hull + jnp.sum(matmul(weights, gram) * weights, axis=1)
    mean = squared_x - 2 * jnp.mean(cross, axis=1) + jnp.mean(gram)
    return jnp.sqrt(jnp.maximum(hull, 0) / mean)


def effective_rank(gram: Float[Array, "n n"], centred: bool = True) -> Float[Array, ""]:
    """exp of the entropy of the normalised singular values of n adapters: 1 (a line) .. n.

    Args:
      gram: [n, n]. centred: subtract the mean adapter first (static).
    """
    n = gram.shape[0]
    if centred:
        centre = jnp.eye(n, dtype=gram.dtype) - 1.0 / n
        gram = matmul(matmul(centre, gram), centre)
    singular = jnp.sqrt(jnp.maximum(numerics.eigvalsh(gram), 0))
    p = singular / jnp.sum(singular)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)))


def wrong_iou(wrong_x: Bool[Array, "m t"], wrong_y: Bool[Array, "n t"]) -> Float[Array, "m n"]:
    """Overlap of mistakes on t test inputs: |both wrong| / |either wrong|.

    Two adapters without any mistake agree in all of them: 1.
    """
    x, y = wrong_x.astype(jnp.float32), wrong_y.astype(jnp.float32)
    both = matmul(x, y.T)
    either = jnp.sum(x, axis=1)[:, None] + jnp.sum(y, axis=1)[None, :] - both
    return jnp.where(either > 0, both / jnp.where(either > 0, either, 1), 1)


SYSTEM = System(
    name="Audit of generated adapters",
    paper="Zeng 2025",
    symbol="novelty_ratio",
    evidence="distances against dense; copies score zero, new seeds one",
    kind="component",
)

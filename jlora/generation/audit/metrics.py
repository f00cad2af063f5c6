r"""Audits of generated adapters: replica, interpolation or something new?

Everything works on inner products of deltas (Gram matrices), which are free of the gauge of the
factors and cost O(d r^2) per entry, never a dense delta. Symbols: g generated, i training adapters.

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
    """Distances from inner products.

    Args:
      cross: inner products of adapters x with adapters y.
      squared_x: squared norms of x.
      squared_y: squared norms of y.

    Returns:
      [m, n].
    """
    square = squared_x[:, None] + squared_y[None, :] - 2 * cross
    return jnp.sqrt(jnp.maximum(square, 0))  # below zero is rounding


def self_distances(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Distances among the adapters of one Gram matrix.

    Args:
      gram: inner products.

    Returns:
      [n, n].
    """
    norms = jnp.diagonal(gram)
    return distances(gram, norms, norms)


def nearest_distance(
    cross: Float[Array, "m n"], squared_x: Float[Array, "m"], squared_y: Float[Array, "n"]
) -> tuple[Float[Array, "m"], Int[Array, "m"]]:
    """How far each adapter is from the nearest training adapter.

    Args:
      cross: inner products of the adapters in question with training adapters.
      squared_x: squared norms of the adapters in question.
      squared_y: squared norms of the training adapters, above 0.

    Returns:
      d_NN, relative to the norm of the training adapter, and which adapter it is.
    """
    relative = distances(cross, squared_x, squared_y) / jnp.sqrt(squared_y)[None, :]
    return jnp.min(relative, axis=1), jnp.argmin(relative, axis=1)


def novelty_ratio(generated: Float[Array, "m"], held_out: Float[Array, "s"]) -> Float[Array, ""]:
    """How new generated adapters are, compared with real ones of held-out seeds.

    Args:
      generated: d_NN of generated adapters.
      held_out: d_NN of real adapters of seeds that were not trained on.

    Returns:
      median over median; 0: replicas.
    """
    return jnp.median(generated) / jnp.median(held_out)


def within_task_distance(
    gram: Float[Array, "n n"], tasks: Int[Array, "n"], runs: Int[Array, "n"]
) -> Float[Array, ""]:
    """Mean over tasks of the mean distance between adapters of one task and different runs.

    Args:
      gram: inner products.
      tasks: task of each adapter.
      runs: seed of each real adapter (snapshots of one run are nearly one point and do not count as
        a
        pair); ``jnp.arange(n)`` for generated adapters, which are all their own.

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
    """Within-task distance of generated adapters over that of real ones across seeds.

    Args:
      gram_generated: inner products of generated adapters.
      tasks_generated: task of each generated adapter.
      gram_real: inner products of real adapters.
      tasks_real: task of each real adapter.
      seeds_real: seed of each real adapter.

    Returns:
      scalar; 0: one adapter over and over.
    """
    alone = jnp.arange(tasks_generated.shape[0], dtype=tasks_generated.dtype)
    generated = within_task_distance(gram_generated, tasks_generated, alone)
    return generated / within_task_distance(gram_real, tasks_real, seeds_real)


def nearest_soup_confusion(
    cross: Float[Array, "m tasks"],
    squared_x: Float[Array, "m"],
    squared_soups: Float[Array, "tasks"],
    tasks: Int[Array, "m"],
) -> Confusion:
    """Which task's soup is each adapter closest to, against the task it was asked for.

    Args:
      cross: inner products of the adapters with the soups.
      squared_x: squared norms of the adapters.
      squared_soups: squared norms of the soups.
      tasks: index of the task each adapter was asked for.

    Returns:
      Counts, fractions and the share of hits.
    """
    number = squared_soups.shape[0]
    nearest = jnp.argmin(distances(cross, squared_x, squared_soups), axis=1)
    asked = jax.nn.one_hot(tasks, number, dtype=jnp.int32)
    counts = asked.T @ jax.nn.one_hot(nearest, number, dtype=jnp.int32)
    rows = jnp.sum(counts, axis=1, keepdims=True)
    matrix = counts.astype(cross.dtype) / jnp.maximum(rows, 1).astype(cross.dtype)
    hits = jnp.trace(counts).astype(cross.dtype)
    return Confusion(counts, matrix, hits / jnp.sum(counts).astype(cross.dtype))


def soup_distance(
    cross_own: Float[Array, "m"], squared_x: Float[Array, "m"], squared_own: Float[Array, "m"]
) -> Float[Array, "m"]:
    """Distance to the soup of the own task over the soup's norm.

    Args:
      cross_own: inner products of the adapters with their own task's soup.
      squared_x: squared norms of the adapters.
      squared_own: squared norms of those soups.

    Returns:
      [m].
    """
    square = jnp.maximum(squared_x + squared_own - 2 * cross_own, 0)
    return jnp.sqrt(square / squared_own)


def affine_residual(
    weights: Float[Array, "m n"],
    gram: Float[Array, "n n"],
    cross: Float[Array, "m n"],
    squared_x: Float[Array, "m"],
) -> Float[Array, "m"]:
    """Distance to the affine hull of a task's training adapters over distance to their mean.

    Args:
      weights: of the projections, from ``span.affine_weights(gram, cross)``.
      gram: inner products of the training adapters; `jax.vmap` over tasks.
      cross: inner products of the adapters in question with them.
      squared_x: squared norms of the adapters in question.

    Returns:
      0 inside the hull, 1 where it explains nothing.
    """
    hull = squared_x - 2 * jnp.sum(weights * cross, axis=1)
    hull = hull + jnp.sum(matmul(weights, gram) * weights, axis=1)
    mean = squared_x - 2 * jnp.mean(cross, axis=1) + jnp.mean(gram)
    return jnp.sqrt(jnp.maximum(hull, 0) / mean)


def effective_rank(gram: Float[Array, "n n"], centred: bool = True) -> Float[Array, ""]:
    """exp of the entropy of the normalised singular values of n adapters.

    Args:
      gram: inner products.
      centred: subtract the mean adapter first (static).

    Returns:
      scalar, from 1 (a line) to n.
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

    Args:
      wrong_x: which inputs each of m adapters gets wrong.
      wrong_y: the same of n adapters.

    Returns:
      [m, n]; 1 for two adapters without any mistake: they agree in all of them.
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

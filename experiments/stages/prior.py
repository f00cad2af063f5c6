"""The prior mean of our generator: kernel ridge from condition to latents, without the own task.

.. math:: m_k(c) = \\bar w + (k(c, C_{-k}) - \\bar k_{-k}) P_{-k} Z_{-k}

C are the seen tasks' conditions, Z their soups' latents, P the ridge smoother; the row of the task
itself (k) is left out, so that what the denoiser learns to add on seen tasks is what it has to add
on unseen ones. Row K of the stack leaves nothing out and serves every other task.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.generation import ridge


class Prior(NamedTuple):
    """Stacked ridge fits, K seen tasks; all arrays."""

    conditions: jax.Array  # [K, 4 E] flat scaled conditions
    offset: jax.Array  # [K + 1, K] constant weights (mean of the kept tasks)
    kernel_mean: jax.Array  # [K + 1, K]
    smoother: jax.Array  # [K + 1, K, K]
    values: jax.Array  # [K, S, L] latents of the task soups
    on: jax.Array  # [] f32, 1: ridge, 0: a prior of mean zero (--prior=none)


def fit(conditions: jax.Array, values: jax.Array, kind: str) -> tuple[Prior, ridge.Choice]:
    """Choose kernel and penalty by leave-one-task-out error and fit the K + 1 smoothers.

    Args:
      conditions: [K, 4, E] scaled conditions of the seen tasks.
      values: [K, S, L] latents of their soups.
      kind: "ridge" or "none".
    """
    flat = conditions.reshape(len(conditions), -1)
    z = values.reshape(len(values), -1)
    choice = ridge.choose(flat, z @ z.T, jnp.arange(len(z)))
    count = len(flat)
    offsets, means, smoothers = [], [], []
    for out in (*range(count), None):
        keep = np.asarray([i for i in range(count) if i != out])
        state = ridge.fit(choice.kernel, flat[keep], choice.penalty)
        offset, mean = np.zeros(count, np.float32), np.zeros(count, np.float32)
        smoother = np.zeros((count, count), np.float32)
        offset[keep], mean[keep] = 1 / len(keep), np.asarray(state.kernel_mean)
        smoother[np.ix_(keep, keep)] = np.asarray(state.smoother)
        offsets.append(offset)
        means.append(mean)
        smoothers.append(smoother)
    on = jnp.float32(kind == "ridge")
    stack = [jnp.asarray(np.stack(x)) for x in (offsets, means, smoothers)]
    return Prior(flat, *stack, values, on), choice


def weights(
    prior: Prior, kernel: ridge.Kernel, cond: jax.Array, who: jax.Array, null: jax.Array | bool
) -> jax.Array:
    """[K] weights over the seen tasks' soups for one condition [4, E].

    Args:
      who: position of the seen task that asks, K for any other task.
      null: without a condition the weights are those of the mean.
    """
    row = kernel(cond.reshape(1, -1), prior.conditions)[0]
    told = (row - prior.kernel_mean[who]) @ prior.smoother[who]
    return prior.offset[who] + jnp.where(null, jnp.zeros_like(told), told)


def mean(
    prior: Prior, kernel: ridge.Kernel, cond: jax.Array, who: jax.Array, null: jax.Array | bool
) -> jax.Array:
    """[S, L] prior mean."""
    return prior.on * jnp.einsum("k,ksl->sl", weights(prior, kernel, cond, who, null), prior.values)

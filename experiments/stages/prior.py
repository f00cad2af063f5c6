"""The prior mean of the generator: kernel ridge from condition to latents.

.. math:: m(c) = \\bar z + (k(c, C) - \\bar k) P Z

C are the seen tasks' conditions, Z their soups' latents, P the ridge smoother. The denoiser models
what is left around it: on seen tasks the spread of seeds and steps, and through the task loss the
corrections that new conditions need.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.generation.baselines import ridge


class Prior(NamedTuple):
    """A ridge fit over K seen tasks; arrays only."""

    fit: ridge.Ridge  # smoother over the flat scaled conditions [K, 4 E]
    values: jax.Array  # [K, S, L] latents of the task soups
    on: jax.Array  # [] f32, 1: ridge, 0: a prior of mean zero (--prior=none)


def fit(conditions: jax.Array, values: jax.Array, kind: str) -> tuple[Prior, ridge.Choice]:
    """Choose kernel and penalty by leave-one-task-out error and fit.

    Args:
      conditions: [K, 4, E] scaled conditions of the seen tasks.
      values: [K, S, L] latents of their soups.
      kind: "ridge" or "none".
    """
    flat = conditions.reshape(len(conditions), -1)
    z = values.reshape(len(values), -1)
    choice = ridge.choose(flat, z @ z.T, jnp.arange(len(z)))
    state = ridge.fit(choice.kernel, flat, choice.penalty)
    return Prior(state, values, jnp.float32(kind == "ridge")), choice


def weights(
    prior: Prior, kernel: ridge.Kernel, cond: jax.Array, null: jax.Array | bool
) -> jax.Array:
    """[K] weights over the seen tasks' soups for one condition [4, E]; null: those of the mean."""
    count = prior.values.shape[0]
    given = ridge.weights(kernel, prior.fit, cond.reshape(1, -1))[0]
    return jnp.where(null, jnp.full_like(given, 1 / count), given)


def mean(prior: Prior, kernel: ridge.Kernel, cond: jax.Array, null: jax.Array | bool) -> jax.Array:
    """[S, L] prior mean."""
    return prior.on * jnp.einsum("k,ksl->sl", weights(prior, kernel, cond, null), prior.values)

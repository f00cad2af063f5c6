r"""The prior mean of a generator: kernel ridge from condition to latents.

.. math:: m(c) = \bar z + (k(c, C) - \bar k) P Z

C are the training tasks' conditions, Z the latents of their soups, P the ridge smoother
(`jlora.generation.baselines.ridge`). A denoiser then models what is left around m(c): the spread of
seeds and steps, and with a task loss the corrections that new conditions need.

Deviates: Cond P-Diff has no such mean; its network starts from noise around zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora.generation.baselines import ridge


class Prior(NamedTuple):
    """A ridge fit over K training tasks; arrays only."""

    fit: ridge.Ridge  # smoother over the flat scaled conditions [K, C E]
    values: Array  # [K, S, L] latents of the task soups
    on: Array  # [] f32, 1: ridge, 0: a prior of mean zero ("none")


def fit(
    conditions: Float[Array, "K C E"], values: Float[Array, "K S L"], kind: str
) -> tuple[Prior, ridge.Choice]:
    """Chooses kernel and penalty by leave-one-task-out error and fits.

    Args:
      conditions: scaled conditions of the training tasks.
      values: latents of their soups.
      kind: "ridge" or "none".

    Returns:
      The prior, and how kernel and penalty were chosen.
    """
    flat = conditions.reshape(len(conditions), -1)
    z = values.reshape(len(values), -1)
    choice = ridge.choose(flat, z @ z.T, jnp.arange(len(z)))
    state = ridge.fit(choice.kernel, flat, choice.penalty)
    return Prior(state, values, jnp.float32(kind == "ridge")), choice


def weights(
    prior: Prior, kernel: ridge.Kernel, cond: Float[Array, "C E"], null: Bool[Array, ""] | bool
) -> Float[Array, "K"]:
    """Weights over the tasks' soups for one condition.

    Args:
      prior: of `fit`.
      kernel: that `fit` chose.
      cond: a scaled condition.
      null: True: no condition, which gives the weights of the mean.

    Returns:
      [K], of sum 1.
    """
    count = prior.values.shape[0]
    given = ridge.weights(kernel, prior.fit, cond.reshape(1, -1))[0]
    return jnp.where(null, jnp.full_like(given, 1 / count), given)


def mean(
    prior: Prior, kernel: ridge.Kernel, cond: Float[Array, "C E"], null: Bool[Array, ""] | bool
) -> Float[Array, "S L"]:
    """The prior mean m(c).

    Args:
      prior: of `fit`.
      kernel: that `fit` chose.
      cond: a scaled condition.
      null: True: no condition.

    Returns:
      [S, L], zero where the prior is "none".
    """
    return prior.on * jnp.einsum("k,ksl->sl", weights(prior, kernel, cond, null), prior.values)

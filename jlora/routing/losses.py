r"""Losses of routers besides the balance loss: of large logits, of entropy, of both.

=========  ==========================================================================
l          logits [*T, E], with probabilities P = softmax(l)
f, p       load [E] (a constant for the gradient) and mean probability [E]
m          mask [*T]: False where a token is padding; means are over the others
=========  ==========================================================================

.. math::
    L_z = \mathrm{mean}_t \big(\log \textstyle\sum_e \exp l_{t,e}\big)^2, \qquad
    H = \mathrm{mean}_t \big(-\textstyle\sum_e P_{t,e} \log P_{t,e}\big), \qquad
    L_{RSL} = a \textstyle\sum_e p_e f_e + \sigma \lambda H

The sign of the entropy is an argument: -1, as LoRA-Mixer prints it, makes a router that minimises
the loss spread each token over the experts; +1 makes it decide, which is what the text says.

Reference: Zoph et al. 2022, `ST-MoE <https://arxiv.org/abs/2202.08906>`_ (z); Li et al. 2025,
`LoRA-Mixer <https://arxiv.org/abs/2507.00029>`_ (RSL).
Deviates: nothing.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def _mean(values: Array, mask: Array | None) -> Array:
    if mask is None:
        return jnp.mean(values)
    count = jnp.maximum(jnp.sum(mask.astype(values.dtype)), jnp.ones((), values.dtype))
    return jnp.sum(jnp.where(mask, values, jnp.zeros((), values.dtype))) / count


def _finite(logits: Array, mask: Array | None) -> Array:
    """Logits without what padding holds, which must not meet the zero of its gradient."""
    if mask is None:
        return logits
    return jnp.where(mask[..., None], logits, jnp.zeros((), logits.dtype))


def z_loss(logits: Float[Array, "*T E"], mask: Bool[Array, "*T"] | None = None) -> Array:
    """How large the logits are, as the mean square of their log-sum-exp.

    Args:
      logits: of the router.
      mask: False where a token is padding.

    Returns:
      [].
    """
    return _mean(jax.nn.logsumexp(_finite(logits, mask), axis=-1) ** 2, mask)


def entropy(logits: Float[Array, "*T E"], mask: Bool[Array, "*T"] | None = None) -> Array:
    """Mean entropy of the probabilities of a token, in nats.

    Args:
      logits: of the router; experts of logit -inf have probability 0.
      mask: False where a token is padding.

    Returns:
      [], from 0 (each token has one expert) to log E (even).
    """
    logits = _finite(logits, mask)
    soft, log = jax.nn.softmax(logits, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    live = jnp.isfinite(logits)  # 0 log 0 is 0, and so is its derivative
    log = jnp.where(live, log, jnp.zeros((), log.dtype))
    return _mean(-jnp.sum(soft * log, axis=-1), mask)


def specialisation(
    balance: Float[Array, ""],
    entropy: Float[Array, ""],
    experts: int,
    weight: float = 1.0,
    entropy_weight: float = 0.1,
    sign: Literal[-1, 1] = -1,
) -> Array:
    """LoRA-Mixer's loss of routing specialisation, from what a router reports.

    Args:
      balance: E sum_e p_e f_e, as routers report it.
      entropy: H, of `entropy`.
      experts: E; the paper's sum lacks this factor.
      weight: a.
      entropy_weight: lambda, at least 0; the paper gives no value.
      sign: of the entropy in the loss that is minimised; -1 is the formula, +1 the text.

    Returns:
      [].

    Raises:
      ValueError: another sign, or an entropy_weight below 0, which would be a sign too.
    """
    if sign not in (-1, 1):
        raise ValueError(f"sign: got {sign}, expected -1 or 1")
    if not entropy_weight >= 0:
        raise ValueError(f"entropy_weight: got {entropy_weight}, expected 0 or more")
    return weight * balance / experts + sign * entropy_weight * entropy

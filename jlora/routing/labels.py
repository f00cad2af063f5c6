r"""Routing by label: the expert of a token is known, and a router may learn it.

=========  ==========================================================================
c_t        label: the number of the expert of token t; below 0: none
l          logits [*T, E]
=========  ==========================================================================

.. math::
    I_t = \{c_t\}, \; g_t = 1 \text{ or, without a label, } 0, \qquad
    L_{label} = -\frac{\sum_{t: c_t \ge 0} \log \mathrm{softmax}(l_t)_{c_t}}{|\{t: c_t \ge 0\}|}

Reference: the hard phase of LoRA-Mixer, Li et al. 2025, `2507.00029
<https://arxiv.org/abs/2507.00029>`_; the loss of MeteoRA's gates, Xu et al. 2024, `2405.13053
<https://arxiv.org/abs/2405.13053>`_.
Deviates: nothing.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jlora.contracts.router import Router, Routes
from jlora.routing import reports
from jlora.routing.rule import State


def hard(labels: Int[Array, "*T"], experts: int, mask: Bool[Array, "*T"] | None = None) -> Routes:
    """Every token to the expert of its label.

    Args:
      labels: below E; negative ones send a token nowhere.
      experts: E.
      mask: False where a token is padding.

    Returns:
      Routes of one choice per token, with balance 0.
    """
    weights = (labels >= 0).astype(jnp.float32)[..., None]
    ids = jnp.maximum(labels, 0).astype(jnp.int32)[..., None]
    rows = jax.nn.one_hot(labels, experts, dtype=weights.dtype)
    _, load = reports.measure(rows, ids, weights, mask)
    return Routes(ids, weights, jnp.zeros((), weights.dtype), load)


def label_loss(
    logits: Float[Array, "*T E"], labels: Int[Array, "*T"], mask: Bool[Array, "*T"] | None = None
) -> Array:
    """Cross entropy of the router with the labels of tokens.

    Args:
      logits: of the router.
      labels: below E; tokens of negative labels do not count.
      mask: False where a token is padding.

    Returns:
      [], the mean over tokens with a label; 0 where there are none.
    """
    real = labels >= 0 if mask is None else (labels >= 0) & mask
    logits = jnp.where(real[..., None], logits, jnp.zeros((), logits.dtype))
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    loss = -jnp.sum(jax.nn.log_softmax(logits, axis=-1) * hot, axis=-1)
    count = jnp.sum(real.astype(logits.dtype))
    return jnp.sum(jnp.where(real, loss, jnp.zeros((), loss.dtype))) / jnp.maximum(
        count, jnp.ones((), loss.dtype)
    )


def _by_largest(
    logits: Float[Array, "*T E"], state: State, train: bool, mask: Array | None
) -> tuple[Routes, State]:
    """The contract's form: the label of a token is where its row is largest."""
    return hard(jnp.argmax(logits, axis=-1), logits.shape[-1], mask), state


SYSTEM = Router(
    name="Routing by label",
    paper="Li 2025, 2507.00029",
    symbol="hard",
    evidence="numpy value; loss against numpy; gates learn labels; the laws of routers; a mutation",
    kind="component",
    init_state=lambda experts: {},
    route=_by_largest,
    breaks={"gradient": "a label has no derivative"},
)

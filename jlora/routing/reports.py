r"""What a router reports: how many choices fell on each expert, how evenly, how many were dropped.

===========  ========================================================================
I, g         ids and weights [*T, k]; a choice with weight 0 is none
P            probabilities [*T, E], any that are differentiable by the logits
m            mask [*T], 1 for real tokens and 0 for padding
c, f         counts and load [E]
===========  ========================================================================

.. math::
    c_e = \sum_{t,j} m_t [I_{t,j} = e][g_{t,j} > 0], \qquad f = \frac{c}{\sum_e c_e}, \qquad
    L_{balance} = E \sum_e f_e \frac{\sum_t m_t P_{t,e}}{\sum_t m_t}

    \text{dropped} = 1 - \frac{\sum_e c_e}{k \sum_t m_t}

f is a constant for the gradient. All are 0 without any token.

Fedus, Zoph and Shazeer, `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2022.

Deviates: nothing.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jlora.contracts.router import Routes


def chosen(scores: Float[Array, "*T E"], ids: Int[Array, "*T k"]) -> jax.Array:
    """The scores of the chosen experts; a sum of one-hot rows, as explicit meshes have no gather.

    Args:
      scores: of all experts.
      ids: the chosen ones.

    Returns:
      [*T, k].
    """
    hot = jax.nn.one_hot(ids, scores.shape[-1], dtype=scores.dtype)
    return jnp.sum(hot * scores[..., None, :], axis=-1)


def mean(values: Float[Array, "*T E"], mask: Bool[Array, "*T"] | None = None) -> jax.Array:
    """The mean over tokens.

    Args:
      values: any, of padding too.
      mask: False where a token is padding.

    Returns:
      [E]; 0 without any token.
    """
    tokens, dtype = tuple(range(values.ndim - 1)), values.dtype
    if mask is None:
        return jnp.mean(values, axis=tokens)
    # padding may hold anything: what is not finite must not meet the zero of its mask
    real = jnp.where(mask[..., None], values, jnp.zeros((), dtype))
    total = jnp.maximum(jnp.sum(mask.astype(dtype)), jnp.ones((), dtype))
    return jnp.sum(real, axis=tokens) / total


def counts(
    ids: Int[Array, "*T k"],
    weights: Float[Array, "*T k"],
    experts: int,
    mask: Bool[Array, "*T"] | None = None,
) -> jax.Array:
    """How many choices fell on each expert.

    Args:
      ids: the chosen experts.
      weights: their weights; a choice with weight 0 does not count.
      experts: E.
      mask: False where a token is padding.

    Returns:
      [E], in the dtype of the weights; a constant for the gradient.
    """
    kept = weights > 0 if mask is None else (weights > 0) & mask[..., None]
    hot = jax.nn.one_hot(ids, experts, dtype=weights.dtype) * kept.astype(weights.dtype)[..., None]
    return jax.lax.stop_gradient(jnp.sum(hot, axis=tuple(range(ids.ndim))))


def measure(
    probabilities: Float[Array, "*T E"],
    ids: Int[Array, "*T k"],
    weights: Float[Array, "*T k"],
    mask: Bool[Array, "*T"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The balance loss and the load of routes.

    Args:
      probabilities: what the balance loss moves; of padding, any numbers.
      ids: the chosen experts.
      weights: their weights; a choice with weight 0 does not count.
      mask: False where a token is padding.

    Returns:
      (balance [], load [E]).
    """
    experts, dtype = probabilities.shape[-1], probabilities.dtype
    count = counts(ids, weights, experts, mask).astype(dtype)
    load = count / jnp.maximum(jnp.sum(count), jnp.ones((), dtype))
    return experts * jnp.sum(load * mean(probabilities, mask)), load


def report(routes: Routes, mask: Bool[Array, "*T"] | None = None) -> dict[str, jax.Array]:
    """What a method reports of its routes through `aux`.

    Args:
      routes: of a router.
      mask: False where a token is padding.

    Returns:
      "balance" [], "load" [E], "counts" [E] and "dropped" [], the share of choices with weight 0.
    """
    ids, weights = routes.ids, routes.weights
    count = counts(ids, weights, routes.load.shape[-1], mask)
    tokens = jnp.full((), ids[..., 0].size, weights.dtype) if mask is None else jnp.sum(
        mask.astype(weights.dtype))  # fmt: skip
    offered = jnp.maximum(ids.shape[-1] * tokens, jnp.ones((), weights.dtype))
    dropped = jnp.where(tokens > 0, 1 - jnp.sum(count) / offered, jnp.zeros((), weights.dtype))
    return {"balance": routes.balance, "load": routes.load, "counts": count, "dropped": dropped}

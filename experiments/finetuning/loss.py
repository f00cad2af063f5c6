r"""Cross-entropy of the learned tokens, as a sum and a count.

Sums add up over the parts of a batch where means do not: the parts may have different numbers of
learned tokens.

.. math::
    S = -\sum_t w_t \log p(i_t \mid i_{<t}), \qquad N = \sum_t w_t, \qquad L = S / N
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def total(
    logits: Float[Array, "b t vocab"], ids: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """S, in nats, and N.

    Args:
      logits: of the decoder, float32.
      ids: the tokens themselves.
      weights: per token, how much its own prediction counts; that of a row's first one is ignored.
    """
    picked = jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked
    # where, not *: the logits of padding may be anything
    counted = jnp.where(weights[:, 1:] > 0, losses * weights[:, 1:], 0.0)
    return jnp.sum(counted), jnp.sum(weights[:, 1:])

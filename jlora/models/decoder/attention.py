r"""Causal attention with grouped heads, and what a query may see.

Symbols: query head j reads key head ``j // g``, g = heads / kv_heads; cap c.

.. math::
    o_q = \sum_k \operatorname{softmax}_k\left(\operatorname{cap}(s\,q_q k_k) + m_{qk}\right) v_k,
    \qquad \operatorname{cap}(x) = c \tanh(x / c)

A model takes any function of the signature of `attend` (LongLoRA's shifted groups are one).

Reference: Ainslie et al. 2023 (arXiv:2305.13245); Gemma Team 2024 (arXiv:2408.00118).
"""

from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.models.layers import MASKED, softmax


class Attend(Protocol):
    """The signature of `attend`."""

    def __call__(
        self,
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b s kv width"],
        v: Float[Array, "b s kv width"],
        visible: Bool[Array, "b t s"],
        *,
        scale: float,
        cap: float,
    ) -> Float[Array, "b t heads width"]: ...


def visible(
    queries: Int[Array, "b t"],
    keys: Int[Array, "b s"],
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    window: int = 0,
) -> Bool[Array, "b t s"]:
    """Which keys each query sees: earlier ones and itself, of its own segment, within the window.

    Args:
      queries: positions of the queries.
      keys: positions of the keys.
      query_segments: documents of packed rows, any integers; None: one document per row.
      key_segments: those of the keys; given with `query_segments`.
      window: tokens seen, the query's own included; 0: all.

    Returns:
      True where query t of a row sees key s.
    """
    ahead = queries[:, :, None] - keys[:, None, :]
    seen = ahead >= 0
    if window:
        seen &= ahead < window
    if query_segments is not None and key_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    return seen


def attend(
    q: Float[Array, "b t heads width"],
    k: Float[Array, "b s kv width"],
    v: Float[Array, "b s kv width"],
    visible: Bool[Array, "b t s"],
    *,
    scale: float,
    cap: float,
) -> Float[Array, "b t heads width"]:
    """Attention of grouped heads; logits and softmax in float32.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      visible: what each query sees; one that sees nothing gets the mean of all values.
      scale: s.
      cap: c; 0: uncapped.

    Returns:
      The mixed values by head, in the dtype of v.
    """
    b, t, heads, width = q.shape
    grouped = q.reshape(b, t, k.shape[2], heads // k.shape[2], width)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    logits = soft_cap(logits, cap)
    weights = softmax(jnp.where(visible[:, None, None], logits, MASKED)).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(b, t, heads, width)


def soft_cap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Logits squeezed into (-cap, cap).

    Args:
      x: logits.
      cap: c; 0: uncapped.

    Returns:
      ``cap tanh(x / cap)``, or x itself where cap is 0.
    """
    return cap * jnp.tanh(x / cap) if cap else x

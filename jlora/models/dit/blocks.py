r"""One block of a pixel DiT: self-attention, attention to words, feed-forward.

.. math::
    (\beta_1, \gamma_1, g_1, \beta_2, \gamma_2, g_2) &= m_l(c) \\
    x &\leftarrow x + g_1 \odot A((1 + \gamma_1) \odot \mathrm{LN}(x) + \beta_1) \\
    x &\leftarrow x + C(\mathrm{LN}(x), w) \\
    x &\leftarrow x + g_2 \odot F((1 + \gamma_2) \odot \mathrm{LN}(x) + \beta_2)

    A(y) = O\,\operatorname{softmax}(N(Q y)\, N(K y)^\top / \sqrt{d / H})\, V y, \qquad
    F(y) = D\,\mathrm{gelu}(U y)

Symbols: x -> tokens [T, d], w -> ``words`` [n, d] with ``seen`` [n], m -> `modulation`, LN has no
parameters, N divides by the root mean square and multiplies by a learned scale (or is the identity,
without ``qk_norm``), C is A with keys and values of w and without N; its output matrix starts at
zero, as g does, so a fresh block is the identity.

Shapes: one picture; use ``jax.vmap``. Parameters of one block::

    modulation  of `jlora.models.dit.modulation`
    attention   query | key | value | out {kernel [d, d], bias [d]} [q_norm | k_norm {scale [d/H]}]
    cross       query | key | value | out {kernel, bias}
    ffn         up {kernel [d, ffn], bias}, down {kernel [ffn, d], bias}

Reference: Peebles and Xie 2023 (arXiv:2212.09748); attention to words between the others without
    modulation, Chen et al. 2023 (arXiv:2310.00426); N, Wang et al. 2024 (arXiv:2410.13925).
Deviates: GELU in its tanh form as in DiT, where FiTv2 has SwiGLU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jlora.models import layers
from jlora.models.dit.config import DiTConfig
from jlora.models.dit.modulation import init_own, modulation
from jlora.types import Tree

EPSILON = 1e-6  # of both norms, as in DiT


class Traced(NamedTuple):
    """What a block computed on the way."""

    tokens: Float[Array, "T d"]  # after the block
    attention: Float[Array, "H T T"]  # probabilities: head, query, key
    cross: Float[Array, "H T n"]  # probabilities over words


def norm(x: Float[Array, "T d"]) -> Float[Array, "T d"]:
    """Layer norm without parameters of its own.

    Args:
      x: tokens.

    Returns:
      The same shape.
    """
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + EPSILON)


def dense(x: Float[Array, "... d_in"], leaves: Tree) -> Float[Array, "... d_out"]:
    """x W + b.

    Args:
      x: any number of rows.
      leaves: {kernel [d_in, d_out], bias [d_out]}.

    Returns:
      As many rows.
    """
    out = x @ leaves["kernel"]
    return out + leaves["bias"].reshape((1,) * (out.ndim - 1) + (-1,))


def attend(
    leaves: Tree,
    x: Float[Array, "T d"],
    source: Float[Array, "n d"],
    seen: Bool[Array, "n"],
    heads: int,
) -> tuple[Float[Array, "T d"], Float[Array, "H T n"]]:
    """Attention of one sequence to another or to itself.

    Args:
      leaves: query, key, value, out, and q_norm with k_norm where they are to be normalised.
      x: what asks.
      source: what is read.
      seen: which rows of `source` may be read; at least one.
      heads: H.

    Returns:
      The result, and the probabilities.
    """
    q, k, v = (
        dense(rows, leaves[name]).reshape(len(rows), heads, -1)
        for rows, name in ((x, "query"), (source, "key"), (source, "value"))
    )
    if "q_norm" in leaves:
        q, k = _unit(q, leaves["q_norm"]), _unit(k, leaves["k_norm"])
    logits = jnp.einsum("qhw,khw->hqk", q * q.shape[-1] ** -0.5, k)
    bias = jnp.where(seen, jnp.float32(0.0), jnp.float32(layers.MASKED))
    weights = layers.softmax(logits + bias[None, None])
    mixed = jnp.einsum("hqk,khw->qhw", weights, v).reshape(x.shape)
    return dense(mixed, leaves["out"]), weights


def _unit(x: Array, leaves: Tree) -> Array:
    size = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    return x * size * leaves["scale"][None, None]


def block(
    leaves: Tree,
    x: Float[Array, "T d"],
    condition: Float[Array, "d"],
    shared: Tree | None,
    words: Float[Array, "n d"],
    seen: Bool[Array, "n"],
    heads: int,
) -> Traced:
    """One block.

    Args:
      leaves: its parameters.
      x: tokens of a picture.
      condition: c.
      shared: the modulation that all blocks have in common; None for adaLN.
      words: of the name.
      seen: which of them are there; at least one.
      heads: H.

    Returns:
      The new tokens and the maps of both attentions.
    """
    m = modulation(condition, leaves["modulation"], shared)[:, None]  # [6, 1, d]
    everything = jnp.ones(len(x), bool)
    y = (1.0 + m[1]) * norm(x) + m[0]
    change, maps = attend(leaves["attention"], y, y, everything, heads)
    x = x + m[2] * change
    change, cross = attend(leaves["cross"], norm(x), words, seen, heads)
    x = x + change
    y = (1.0 + m[4]) * norm(x) + m[3]
    inner = jax.nn.gelu(dense(y, leaves["ffn"]["up"]), approximate=True)
    return Traced(x + m[5] * dense(inner, leaves["ffn"]["down"]), maps, cross)


def init_dense(key: PRNGKeyArray, d_in: int, d_out: int, zero: bool = False) -> Tree:
    """A linear layer.

    Args:
      key: of Glorot's uniform law.
      d_in: features that it reads.
      d_out: features that it writes.
      zero: whether it starts at zero.

    Returns:
      {kernel, bias}, float32.
    """
    draw = jax.nn.initializers.zeros if zero else jax.nn.initializers.glorot_uniform()
    return {"kernel": draw(key, (d_in, d_out), jnp.float32), "bias": jnp.zeros((d_out,))}


def init_block(key: PRNGKeyArray, config: DiTConfig) -> Tree:
    """The parameters of one fresh block, which is the identity.

    Args:
      key: of the kernels.
      config: the architecture.

    Returns:
      The tree of the module's docstring, float32.
    """
    d, keys = config.width, iter(jax.random.split(key, 11))
    names = ("query", "key", "value")
    attention = {name: init_dense(next(keys), d, d) for name in (*names, "out")}
    if config.qk_norm:
        one = jnp.ones((d // config.heads,))
        attention |= {"q_norm": {"scale": one}, "k_norm": {"scale": one}}
    cross = {name: init_dense(next(keys), d, d) for name in names}
    return {
        "modulation": init_own(next(keys), d, config.rank),
        "attention": attention,
        "cross": cross | {"out": init_dense(next(keys), d, d, zero=True)},
        "ffn": {
            "up": init_dense(next(keys), d, config.ffn),
            "down": init_dense(next(keys), config.ffn, d),
        },
    }

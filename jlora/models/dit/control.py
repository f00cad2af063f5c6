r"""A control branch for the DiT: a picture of edges says where things are, the base stays frozen.

The first h blocks of the base are its encoder, the others its decoder. The branch is a trained copy
of the encoder that also reads the control picture e; a linear layer that starts at zero carries
each of its blocks to a block of the decoder:

.. math::
    u_0 = h_0(z, t) + W_e\, \mathrm{patches}(e), \qquad
    u_l = \mathrm{block}'_l(u_{l-1}, c, w), \qquad r_l = Z_l u_l, \qquad l = 1 \ldots h

    h_l = \mathrm{block}_l(h_{l-1}, c, w) \;\; (l \le h), \qquad
    h_{h+l} = \mathrm{block}_{h+l}(h_{h+l-1} + r_l, c, w)

The encoder reads nothing of the branch, so that both can run at the same time and meet once, before
the decoder (`jlora.serving.control_service`).

Symbols: r -> ``residuals``, h -> half of the depth. Parameters of a branch::

    edges   {kernel [P P e, d], bias}     zero at first
    blocks  as the base's, h of them
    out     {kernel [h, d, d], bias}      Z, zero at first: a fresh branch changes nothing

Shapes: one picture; use ``jax.vmap``.

Reference: Zhang et al. 2023 (arXiv:2302.05543); for transformers, Chen et al. 2024
    (arXiv:2401.05252).
Deviates: arXiv:2401.05252 adds r to the first blocks of the base; here they go to the second half,
    as a U-Net's go to its decoder, without which the branch could not run next to the encoder.
    Block l of the branch meets block l of the decoder, where a U-Net's order is reversed. The layer
    of the control picture is linear.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jlora.models.dit.blocks import block, dense, init_dense
from jlora.models.dit.config import DiTConfig
from jlora.models.dit.model import Begun, Condition, begin, cut, end
from jlora.types import Tree


class Encoded(NamedTuple):
    """What the decoder reads of the encoder, for one picture."""

    tokens: Float[Array, "T d"]  # of block h
    condition: Float[Array, "d"]
    words: Float[Array, "n1 d"]
    seen: Bool[Array, "n1"]


def half(config: DiTConfig) -> int:
    """h.

    Args:
      config: the architecture.

    Returns:
      Half of the depth.

    Raises:
      ValueError: an odd depth.
    """
    if config.depth % 2:
        raise ValueError(f"control: depth: got {config.depth}, expected an even one")
    return config.depth // 2


def init(key: PRNGKeyArray, params: Tree, config: DiTConfig, channels: int) -> Tree:
    """A branch that changes nothing yet.

    Args:
      key: required as every other start is; all that is drawn is zero.
      params: of the base, whose encoder is copied.
      config: its architecture.
      channels: of the control picture.

    Returns:
      The tree described above.

    Raises:
      ValueError: an odd depth.
    """
    count, d = half(config), config.width
    return {
        "edges": init_dense(key, config.patch**2 * channels, d, zero=True),
        "blocks": jax.tree.map(lambda x: x[:count], params["blocks"]),
        "out": {"kernel": jnp.zeros((count, d, d)), "bias": jnp.zeros((count, d))},
    }


def _blocks(params: Tree, blocks: Tree, begun: Begun | Encoded, config: DiTConfig, more: Tree):
    """Blocks one after the other, and the tokens after each; `more` is added before each."""
    x, c, words, seen = begun

    def step(x, given):
        leaves, r = given
        x = x if r is None else x + r
        traced = block(leaves, x, c, params.get("modulation"), words, seen, config.heads)
        return traced.tokens, traced.tokens

    return jax.lax.scan(step, x, (blocks, more))


def encode(
    params: Tree,
    picture: Float[Array, "h w c"],
    time: Float[Array, ""],
    condition: Condition,
    null: Bool[Array, ""] | bool,
    config: DiTConfig,
) -> Encoded:
    """The first half of the base. Args and Raises are those of `jlora.models.dit.model.forward`.

    Returns:
      What the second half reads.
    """
    begun, count = begin(params, picture, time, condition, null, config), half(config)
    first = jax.tree.map(lambda x: x[:count], params["blocks"])
    return Encoded(_blocks(params, first, begun, config, None)[0], *begun[1:])


def branch(
    control: Tree,
    params: Tree,
    picture: Float[Array, "h w c"],
    edges: Float[Array, "h w e"],
    time: Float[Array, ""],
    condition: Condition,
    null: Bool[Array, ""] | bool,
    config: DiTConfig,
) -> Float[Array, "half T d"]:
    """The branch, of a noisy picture and a control picture.

    Args:
      control: parameters of the branch.
      params: of the base: embeddings and the modulation that blocks share.
      picture: noisy, as the encoder reads it.
      edges: the control picture.
      time: t.
      condition: style and name.
      null: leave the condition out; the control picture stays.
      config: the base's architecture.

    Returns:
      r, what is added to the input of each block of the decoder.

    Raises:
      ValueError: a control picture of another size, and as `jlora.models.dit.model.forward`.
    """
    if edges.shape[:2] != picture.shape[:2]:
        raise ValueError(
            f"edges: got shape {edges.shape}, expected {picture.shape[:2]} and channels"
        )
    begun = begin(params, picture, time, condition, null, config)
    tokens = begun.tokens + dense(cut(edges, config.patch), control["edges"])
    every = _blocks(params, control["blocks"], begun._replace(tokens=tokens), config, None)[1]
    return jax.vmap(dense)(every, control["out"])


def decode(
    params: Tree,
    encoded: Encoded,
    residuals: Float[Array, "half T d"],
    shape: tuple[int, ...],
    config: DiTConfig,
) -> Float[Array, "h w c"]:
    """The second half of the base.

    Args:
      params: of the base.
      encoded: of `encode`.
      residuals: of `branch`; zero leaves the base as it is.
      shape: of the picture.
      config: the base's architecture.

    Returns:
      The velocity.
    """
    count = half(config)
    last = jax.tree.map(lambda x: x[count:], params["blocks"])
    x = _blocks(params, last, encoded, config, residuals)[0]
    return end(params, x, encoded.condition, shape, config)


def controlled(
    control: Tree,
    params: Tree,
    picture: Float[Array, "h w c"],
    edges: Float[Array, "h w e"],
    time: Float[Array, ""],
    condition: Condition,
    null: Bool[Array, ""] | bool,
    config: DiTConfig,
) -> Float[Array, "h w c"]:
    """All of it, one after the other: what a branch is trained with. Args and Raises are those of
    `branch`.

    Returns:
      The velocity.
    """
    encoded = encode(params, picture, time, condition, null, config)
    added = branch(control, params, picture, edges, time, condition, null, config)
    return decode(params, encoded, added, picture.shape, config)

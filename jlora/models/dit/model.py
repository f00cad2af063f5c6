r"""A DiT on pixels: the velocity of a noisy picture, given a time, a style and a name.

.. math::
    h_0 = W_p\, \mathrm{patches}(z) + b_p + e_{\mathrm{place}}, \qquad
    c = \mathrm{MLP}(\phi(t)) + s_{\mathrm{style}}

    h_l = \mathrm{block}_l(h_{l-1}, c, [\varnothing; w_1 \dots w_n]), \qquad
    (\beta, \gamma) = W_m\, \mathrm{silu}(c) + b_m

    f(z, t) = \mathrm{picture}(W_o\,((1 + \gamma) \odot \mathrm{LN}(h_L) + \beta) + b_o)

Symbols: z -> ``picture`` [h, w, c], :math:`\phi` -> cosines and sines of 1000 t at d / 2
frequencies, s and w -> embedding tables, :math:`\varnothing` -> ``empty``, a learned token that is
always seen, so that a picture without a name has something to attend to. Places are cosines and
sines of row and column, so pictures of any size that the patches divide run, rectangles too.
Everything is for one picture; use ``jax.vmap``. Parameters are a plain dict; every leaf below
``blocks`` has a leading axis L::

    patch       {kernel [P P c, d], bias}
    time        up | down {kernel [d, d], bias}
    style       {embedding [styles + 1, d]}       row 0: no style
    word        {embedding [words, d]}            row 0: padding, not used
    empty       [d]
    [modulation {kernel [d, 6 d], bias}]          AdaLN-LoRA alone
    blocks      of `jlora.models.dit.blocks`
    last        modulation {kernel [d, 2 d], bias}, out {kernel [d, P P c], bias}

The last layer and every gate start at zero: a fresh model returns zero.

Reference: Peebles and Xie 2023 (arXiv:2212.09748); names by cross-attention, Chen et al. 2023
    (arXiv:2310.00426); pictures of any size, Wang et al. 2024 (arXiv:2410.13925).
Deviates: pixels instead of latents; fixed places where FiTv2 rotates queries and keys; no learned
    variance.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jlora.models.dit.blocks import block, dense, init_block, init_dense, norm
from jlora.models.dit.config import DiTConfig
from jlora.models.dit.modulation import init_shared
from jlora.types import Tree

PERIOD = 10_000.0  # of the slowest wave of times and places


class Condition(NamedTuple):
    """What a picture is asked to be."""

    style: Int[Array, ""]  # 1 .. styles; 0: none
    words: Int[Array, "n"]  # rows of the table; 0 is padding, not seen


class Output(NamedTuple):
    """What `forward` returns; None for what was not asked for."""

    velocity: Float[Array, "h w c"]
    features: Float[Array, "L T d"] | None  # tokens after each block
    attention: Float[Array, "L H T T"] | None  # probabilities: block, head, query, key
    cross: Float[Array, "L H T n1"] | None  # over `empty` and the words


def waves(x: Float[Array, "..."], width: int) -> Float[Array, "... width"]:
    """Cosines, then sines, of x at geometric frequencies from 1 down to 1 / PERIOD.

    Args:
      x: any shape.
      width: of the result, even.

    Returns:
      One more axis.
    """
    half = width // 2
    powers = np.exp(-np.log(PERIOD) * np.arange(half) / half).astype(np.float32)
    angle = x[..., None] * powers.reshape((1,) * jnp.ndim(x) + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def places(rows: int, columns: int, width: int) -> Float[Array, "T width"]:
    """The places of patches, row by row: half of the features say the row, half the column.

    Args:
      rows: patches of a column.
      columns: patches of a row.
      width: d, a multiple of 4.

    Returns:
      [rows * columns, d].
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    pair = (waves(jnp.asarray(x.astype(np.float32)), width // 2) for x in (row, column))
    return jnp.concatenate([*pair], axis=-1)


def cut(picture: Float[Array, "h w c"], patch: int) -> Float[Array, "T features"]:
    """Patches row by row, each by row, column and channel.

    Args:
      picture: of sides that P divides.
      patch: P, pixels each way.

    Returns:
      [T, P P c].

    Raises:
      ValueError: P does not divide a side.
    """
    h, w, c = picture.shape
    if h % patch or w % patch or not h * w:
        raise ValueError(f"picture: got {h} x {w}, expected multiples of patch {patch}")
    grid = picture.reshape(h // patch, patch, w // patch, patch, c).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, patch * patch * c)


def joined(
    tokens: Float[Array, "T features"], shape: tuple[int, ...], patch: int
) -> Float[Array, "h w c"]:
    """The picture of patches: what undoes `cut`.

    Args:
      tokens: patches.
      shape: h, w, c.
      patch: P.

    Returns:
      The picture.
    """
    h, w, c = shape
    grid = tokens.reshape(h // patch, w // patch, patch, patch, c).transpose(0, 2, 1, 3, 4)
    return grid.reshape(h, w, c)


class Begun(NamedTuple):
    """What the blocks read: of one picture, before the first of them."""

    tokens: Float[Array, "T d"]
    condition: Float[Array, "d"]  # c
    words: Float[Array, "n1 d"]  # `empty`, then the name
    seen: Bool[Array, "n1"]


def begin(
    params: Tree,
    picture: Float[Array, "h w c"],
    time: Float[Array, ""],
    condition: Condition,
    null: Bool[Array, ""] | bool,
    config: DiTConfig,
) -> Begun:
    """Everything before the blocks. Args and Raises are those of `forward`.

    Returns:
      Tokens and conditions.
    """
    if picture.ndim != 3 or picture.shape[2] != config.channels:
        raise ValueError(f"picture: got shape {picture.shape}, expected [h, w, {config.channels}]")
    tokens = cut(picture, config.patch)
    grid = picture.shape[0] // config.patch, picture.shape[1] // config.patch
    x = dense(tokens, params["patch"]) + places(*grid, config.width)

    style = jnp.where(null, 0, condition.style)
    inner = jax.nn.silu(dense(waves(1000.0 * time, config.width), params["time"]["up"]))
    c = dense(inner, params["time"]["down"]) + params["style"]["embedding"][style]
    words = params["word"]["embedding"][condition.words]
    words = jnp.concatenate([params["empty"][None], words])
    seen = jnp.concatenate([jnp.ones(1, bool), (condition.words > 0) & ~jnp.asarray(null)])
    return Begun(x, c, words, seen)


def end(
    params: Tree,
    tokens: Float[Array, "T d"],
    condition: Float[Array, "d"],
    shape: tuple[int, ...],
    config: DiTConfig,
) -> Float[Array, "h w c"]:
    """Everything after the blocks.

    Args:
      params: of the model.
      tokens: of the last block.
      condition: c.
      shape: of the picture.
      config: the architecture.

    Returns:
      The velocity.
    """
    both = dense(jax.nn.silu(condition), params["last"]["modulation"])[None]
    shift, scale = jnp.split(both, 2, axis=-1)
    out = dense((1.0 + scale) * norm(tokens) + shift, params["last"]["out"])
    return joined(out, shape, config.patch)


def forward(
    params: Tree,
    picture: Float[Array, "h w c"],
    time: Float[Array, ""],
    condition: Condition,
    null: Bool[Array, ""] | bool = False,
    *,
    config: DiTConfig,
    features: bool = False,
    maps: bool = False,
) -> Output:
    """The DiT as a pure function of its parameters, for one picture.

    Args:
      params: the tree described above.
      picture: noisy, of any size that the patches divide.
      time: t in [0, 1]; 1 is noise.
      condition: style and name.
      null: leave the condition out, for classifier-free guidance.
      config: the architecture.
      features: return the tokens after each block.
      maps: return the probabilities of both attentions.

    Returns:
      The velocity, and what was asked for.

    Raises:
      ValueError: channels of another number, a side that the patches do not divide.
    """
    x, c, words, seen = begin(params, picture, time, condition, null, config)

    def step(x, leaves):
        traced = block(leaves, x, c, params.get("modulation"), words, seen, config.heads)
        kept = (traced.tokens if features else None, *(traced[1:] if maps else (None, None)))
        return traced.tokens, kept

    x, kept = jax.lax.scan(step, x, params["blocks"])
    return Output(end(params, x, c, picture.shape, config), *kept)


@functools.partial(jax.jit, static_argnames="config")
def init(key: PRNGKeyArray, config: DiTConfig) -> Tree:
    """Fresh parameters.

    Args:
      key: of the kernels and tables.
      config: the architecture.

    Returns:
      The tree described above, float32; the model returns zero.
    """
    d, pixels = config.width, config.patch**2 * config.channels
    patch, up, down, style, word, empty, blocks, last = jax.random.split(key, 8)
    table = lambda key, *shape: 0.02 * jax.random.normal(key, shape)  # noqa: E731
    shared = {} if config.rank == 0 else {"modulation": init_shared(d)}
    return shared | {
        "patch": init_dense(patch, pixels, d),
        "time": {"up": init_dense(up, d, d), "down": init_dense(down, d, d)},
        "style": {"embedding": table(style, config.styles + 1, d)},
        "word": {"embedding": table(word, config.words, d)},
        "empty": table(empty, d),
        "blocks": jax.vmap(lambda key: init_block(key, config))(
            jax.random.split(blocks, config.depth)
        ),
        "last": {
            "modulation": init_dense(last, d, 2 * d, zero=True),
            "out": init_dense(last, d, pixels, zero=True),
        },
    }

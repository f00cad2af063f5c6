r"""A BERT-family text encoder in Flax Linen, its layers one ``nn.scan``.

Symbols: tokens :math:`i_t` = ``ids``, mask :math:`m_t` = ``mask``, states :math:`h` = ``hidden``,
depth L = ``config.layers``, width d = ``config.width``.

.. math::
    h^0_t = \mathrm{LN}(E_{i_t} + P_t + S_0), \qquad
    u = \mathrm{LN}(h^{l} + O\,\mathrm{attention}(Q h^{l}, K h^{l}, V h^{l})), \qquad
    h^{l+1} = \mathrm{LN}(u + D\,\mathrm{gelu}(U u))

Shapes: ``ids`` int32 ``[b, t]``, ``mask`` bool ``[b, t]``, ``hidden`` ``[b, t, d]`` of
``config.dtype``. Parameters are a plain dict; every leaf below ``layers`` has a leading axis L::

    embeddings  word | position | type {embedding}, norm {scale, bias}
    layers      attention {query | key | value | out {kernel, bias}, norm}
                ffn       {up | down {kernel, bias}, norm}

``embed`` and ``run`` are the two halves of ``Encoder`` as functions of parts of that dict, so the
frozen lower layers can be computed once and cached (``split``).

Errors: ``ValueError`` for more tokens than positions, for a mask that is not bool of the tokens'
shape, and for a cut outside the stack.

Source: paper, Devlin et al. 2019 (arXiv:1810.04805), post-norm with exact GELU.
Deviates: no dropout, no pooler, segment 0 unless ``segments`` is given.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.models import layers
from jlora.models.encoder_config import EncoderConfig, Params
from jlora.models.encoder_io import config_from_hf, load, save
from jlora.models.tokenization import tokenizer

__all__ = [
    "Encoder",
    "EncoderConfig",
    "config_from_hf",
    "embed",
    "load",
    "mean_pool",
    "run",
    "save",
    "split",
    "tokenizer",
]


class Norm(nn.Module):
    """LayerNorm over the last axis with parameters ``scale`` and ``bias``."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layers.layer_norm(x, scale, bias, self.config.norm_eps)


def _dense(config: EncoderConfig, features: int, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.init_std)
    return nn.Dense(features, dtype=config.dtype, kernel_init=init, name=name)


class Embeddings(nn.Module):
    """Tokens to vectors: word + position + segment tables, then a norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Array, segments: Array | None = None) -> Array:
        c = self.config
        table = lambda rows, name: nn.Embed(  # noqa: E731
            rows,
            c.width,
            dtype=c.dtype,
            embedding_init=nn.initializers.normal(c.init_std),
            name=name,
        )
        if ids.shape[1] > c.max_positions:
            raise ValueError(f"ids: got {ids.shape[1]} tokens, expected <= {c.max_positions}")
        if segments is None:
            segments = jnp.zeros((1, 1), jnp.int32)
        places = jnp.arange(ids.shape[1])[None]
        x = table(c.vocab, "word")(ids)
        x = x + table(c.max_positions, "position")(places) + table(c.segments, "type")(segments)
        return Norm(c, name="norm")(x)


class Attention(nn.Module):
    """Self-attention, residual and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> Array:
        c = self.config
        q, k, v = (_dense(c, c.inner, name)(x) for name in ("query", "key", "value"))
        mixed = layers.attention(q, k, v, bias, c.heads)
        return Norm(c, name="norm")(x + _dense(c, c.width, "out")(mixed))


class FeedForward(nn.Module):
    """Two matrices with GELU between, residual and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        inner = layers.gelu(_dense(c, c.ffn, "up")(x))
        return Norm(c, name="norm")(x + _dense(c, c.width, "down")(inner))


class Layer(nn.Module):
    """One step of the scan: ``(hidden, bias) -> (hidden, None)``."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> tuple[Array, None]:
        x = Attention(self.config, name="attention")(x, bias)
        return FeedForward(self.config, name="ffn")(x), None


def _stack(config: EncoderConfig, depth: int, name: str | None = None) -> nn.Module:
    """``depth`` layers as one scanned module over leading-axis parameters."""
    scanned = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=depth,
    )
    return scanned(config, name=name)


class Encoder(nn.Module):
    """Tokens to last hidden states: ``Encoder(config).apply({'params': p}, ids, mask)``."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Array, mask: Array, segments: Array | None = None) -> Array:
        _check_mask(ids.shape, mask)
        x = Embeddings(self.config, name="embeddings")(ids, segments)
        return _stack(self.config, self.config.layers, "layers")(x, layers.mask_bias(mask))[0]


def embed(config: EncoderConfig, params: Params, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The lower half of ``Encoder``: tokens to vectors.

    Args:
      config: the architecture.
      params: holds "embeddings"; the rest is not read.
      ids: tokens.

    Returns:
      Vectors with position and segment 0 added, in ``config.dtype``.

    Raises:
      ValueError: more tokens than positions.
    """
    return cast(Array, Embeddings(config).apply({"params": params["embeddings"]}, ids))


def run(
    params: Params, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"], config: EncoderConfig
) -> Float[Array, "b t d"]:
    """The upper half of ``Encoder``: all layers in the parameters, however many they are.

    Args:
      params: holds "layers"; the rest is not read.
      hidden: states, of `embed` or of the lower part of a `split`.
      mask: True for a token.
      config: the architecture; its depth is not read.

    Returns:
      Last states.

    Raises:
      ValueError: a mask of another dtype or shape.
    """
    _check_mask(hidden.shape[:2], mask)
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    stack = _stack(config, depth)
    return stack.apply({"params": params["layers"]}, hidden, layers.mask_bias(mask))[0]


def split(params: Params, k: int) -> tuple[Params, Params]:
    """Cuts the stack below layer k.

    Args:
      params: of an encoder.
      k: how many layers stay below, 0 to L.

    Returns:
      (embeddings and the first k layers, {"layers": the others}).

    Raises:
      ValueError: a cut outside the stack.
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if not 0 <= k <= depth:
        raise ValueError(f"split: got k={k}, expected 0 <= k <= {depth}")
    lower = {**params, "layers": jax.tree.map(lambda x: x[:k], params["layers"])}
    return lower, {"layers": jax.tree.map(lambda x: x[k:], params["layers"])}


def mean_pool(hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """Mean of the unmasked states, scaled to unit norm.

    The length of the mean cancels, so this is the sum over its norm.

    Args:
      hidden: states.
      mask: True for a token.

    Returns:
      One vector per row; zeros for a row without tokens.
    """
    total = jnp.einsum("btd,bt->bd", hidden, mask.astype(hidden.dtype))
    square = jnp.sum(total * total, axis=-1, keepdims=True)
    empty = square == 0
    # The inner where keeps the gradient of an empty row finite (0 * inf would be NaN).
    return total * jnp.where(empty, 0, jax.lax.rsqrt(jnp.where(empty, 1, square)))


def _check_mask(shape: tuple[int, ...], mask: Array) -> None:
    if mask.shape != tuple(shape) or mask.dtype != bool:
        raise ValueError(f"mask: got {mask.dtype}{mask.shape}, expected bool{tuple(shape)}")

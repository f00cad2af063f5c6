"""The protocol of codecs, and the three of them by name.

A codec is four pure functions; T tokens of D numbers become a sequence of S latents of L numbers at
about unit scale. All but `fit` are for one adapter (`jax.vmap` for a bank), and `decode` is
differentiable: it may sit inside a task loss.

    codec = by_name("pca")
    state, info = codec.fit(key, x, codec.config(components=64))    # x [n, T, D], training only
    z = jax.vmap(codec.encode, (None, 0))(state, x)                 # [n, S, L]

States are PyTrees whose hyper-parameters are static, so they pass through jit; `template` gives the
structure, shapes and dtypes of a state to restore a checkpoint into.

Deviates: nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from jlora.generation.codecs import conv as codec_conv
from jlora.generation.codecs import pca as codec_pca
from jlora.generation.codecs import token as codec_token
from jlora.types import Dynamic, Tree


class Codec(NamedTuple):
    """Functions of one codec."""

    config: Callable[..., Dynamic]  # class of its hyper-parameters
    fit: Callable[
        ..., tuple[Tree, Dynamic]
    ]  # (key, x [n, T, D], config, *, view, callback, resume)
    encode: Callable[[Tree, jax.Array], jax.Array]  # (state, x [T, D]) -> z [S, L]
    decode: Callable[[Tree, jax.Array], jax.Array]  # (state, z [S, L]) -> x [T, D]
    init: Callable[..., Tree]  # (key, config, T, D) -> untrained state


CODECS = {
    "pca": Codec(
        codec_pca.PCAConfig, codec_pca.fit, codec_pca.encode, codec_pca.decode, codec_pca.init
    ),
    "token_ae": Codec(
        codec_token.TokenAEConfig,
        codec_token.fit,
        codec_token.encode,
        codec_token.decode,
        codec_token.init,
    ),
    "conv_ae": Codec(
        codec_conv.ConvAEConfig,
        codec_conv.fit,
        codec_conv.encode,
        codec_conv.decode,
        codec_conv.init,
    ),
}


def by_name(name: str) -> Codec:
    """The codec of a name.

    Args:
      name: "pca", "token_ae" or "conv_ae".

    Returns:
      Its functions.

    Raises:
      ValueError: an unknown name (lists the known ones).
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}, expected one of {tuple(CODECS)}")
    return CODECS[name]


def template(name: str, config: Dynamic, length: int, dim: int) -> Tree:
    """Shapes and dtypes of a codec's state; computes nothing.

    Args:
      name: of the codec.
      config: its hyper-parameters.
      length: T, tokens of an adapter.
      dim: D, numbers of a token.

    Returns:
      A state of ShapeDtypeStructs, to restore a checkpoint into.

    Raises:
      ValueError: an unknown name.
    """
    init = functools.partial(by_name(name).init, config=config, length=length, dim=dim)
    return jax.eval_shape(init, jax.random.key(0))

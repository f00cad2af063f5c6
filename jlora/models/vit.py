r"""A vision transformer (ViT) in Flax Linen, its layers one ``nn.scan``, and its loader.

Symbols: image :math:`x`, patches :math:`p_n(x)` of side P, states :math:`h`, depth L =
``config.layers``, width d = ``config.width``, N = (side / P)^2 patches, c = ``config.channels``.

.. math::
    h^0 = [s; W p_1(x) + b; \dots; W p_N(x) + b] + E, \qquad
    u = h^l + O\,\mathrm{attention}(Q z, K z, V z), \; z = \mathrm{LN}(h^l), \qquad
    h^{l+1} = u + D\,\mathrm{gelu}(U\,\mathrm{LN}(u))

and the result is :math:`\mathrm{LN}(h^L)`.

Shapes: ``images`` float ``[b, side, side, c]`` -> ``[b, 1 + N, d]`` of ``config.dtype``; row 0 is
the class token. Parameters are a plain dict; every leaf below ``layers`` has a leading axis L::

    embeddings  cls [d], position {embedding [1 + N, d]}, patch {kernel [c P P, d], bias}
    layers      attention {query | key | value | out {kernel, bias}, norm {scale, bias}}
                ffn       {up | down {kernel, bias}, norm}
    norm        {scale, bias}

The paths of the kernels are those of `jlora.io.vit` and `vit4`, so PEFT adapters of a
``ViTModel`` load. ``load(directory)`` reads ``config.json`` and ``model.safetensors``.

Errors: ``ValueError`` for images of another shape, a width that the heads do not divide and a side
that the patches do not; for a config that this model does not implement (field, got, expected), and
for tensors that are missing, surplus (other than heads and pooler), misshapen or not finite.

Source: paper, Dosovitskiy et al. 2021 (arXiv:2010.11929) of the published checkpoints.
Deviates: no dropout, no pooler; no interpolation of positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.models import layers
from jlora.models.encoder_config import Params
from jlora.models.hf import read_config, read_leaves

# Parts of a checkpoint the model does not have.
IGNORE = r"pooler\..*|classifier\..*|decoder\..*|embeddings\.mask_token"
_FIELDS = {
    "side": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
}
_FIXED = {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True}
_MODULES = {
    "attention/norm": "layernorm_before",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "ffn/norm": "layernorm_after",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
}


@dataclass(frozen=True)
class VitConfig:
    """Architecture of a ViT; hashable, so it may be a static argument of jit."""

    side: int  # pixels of an image, each way
    patch: int  # P, pixels of a patch, each way
    layers: int
    width: int  # d
    heads: int
    ffn: int  # inner width of the feed-forward block
    channels: int = 3
    norm_eps: float = 1e-12
    init_std: float = 0.02  # of fresh kernels and tables
    dtype: str = "float32"  # of activations and matmuls; the parameters keep their own

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.side % self.patch:
            raise ValueError(f"side {self.side} is not a multiple of patch {self.patch}")

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return (self.side // self.patch) ** 2


class Norm(nn.Module):
    """LayerNorm over the last axis with parameters ``scale`` and ``bias``."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layers.layer_norm(x, scale, bias, self.config.norm_eps)


def _dense(config: VitConfig, features: int, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.init_std)
    return nn.Dense(features, dtype=config.dtype, kernel_init=init, name=name)


def cut(images: Float[Array, "b side side c"], patch: int) -> Float[Array, "b N features"]:
    """Patches of images, row by row, each by channel, row and column.

    Args:
      images: of a side that P divides.
      patch: P, pixels each way.

    Returns:
      [b, N, c P P].
    """
    b, side, _, c = images.shape
    n = side // patch
    grid = images.reshape(b, n, patch, n, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return grid.reshape(b, n * n, c * patch * patch)


class Embeddings(nn.Module):
    """Images to tokens: the class token and the patches, each with its place added."""

    config: VitConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        c = self.config
        expected = (c.side, c.side, c.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images: got shape {images.shape}, expected [b, *{expected}]")
        init = nn.initializers.normal(c.init_std)
        first = self.param("cls", init, (c.width,))
        table = nn.Embed(
            c.patches + 1, c.width, dtype=c.dtype, embedding_init=init, name="position"
        )
        x = _dense(c, c.width, "patch")(cut(images, c.patch))
        head = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, c.width))
        return jnp.concatenate([head, x], 1) + table(jnp.arange(c.patches + 1)[None])


class Attention(nn.Module):
    """Norm, self-attention over all tokens, residual."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        z = Norm(c, name="norm")(x)
        q, k, v = (_dense(c, c.width, name)(z) for name in ("query", "key", "value"))
        mixed = layers.attention(q, k, v, jnp.zeros(x.shape[:2], jnp.float32), c.heads)
        return x + _dense(c, c.width, "out")(mixed)


class FeedForward(nn.Module):
    """Norm, two matrices with GELU between, residual."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        inner = layers.gelu(_dense(c, c.ffn, "up")(Norm(c, name="norm")(x)))
        return x + _dense(c, c.width, "down")(inner)


class Layer(nn.Module):
    """One step of the scan: ``hidden -> (hidden, None)``."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        x = Attention(self.config, name="attention")(x)
        return FeedForward(self.config, name="ffn")(x), None


class Vit(nn.Module):
    """Images to normed last states: ``Vit(config).apply({'params': p}, images)``."""

    config: VitConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = Embeddings(self.config, name="embeddings")(images)
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.layers,
        )
        x, _ = stack(self.config, name="layers")(x, None)
        return Norm(self.config, name="norm")(x)


def config_from_hf(directory: str | Path) -> VitConfig:
    """Reads ``config.json``.

    Args:
      directory: of the checkpoint.

    Returns:
      The architecture.

    Raises:
      ValueError: a field is missing, or asks for what the model does not implement.
    """
    return read_config(directory, VitConfig, _FIELDS, _FIXED, ("init_std",))


def load(directory: str | Path, ignore: str = IGNORE) -> tuple[VitConfig, Params]:
    """Reads a checkpoint directory.

    Args:
      directory: holds ``config.json`` and the weights.
      ignore: a regex of names of tensors, less ``vit.``, that are left alone; by default the parts
        that
        the model lacks.

    Returns:
      The architecture and the parameters, in the dtype of the file.

    Raises:
      ValueError: as `config_from_hf`; or tensors are missing, surplus, misshapen, of another dtype
        or
        not finite.
    """
    config = config_from_hf(directory)
    names = list(_names(config))
    return config, read_leaves(directory, names, _plain, _ours, ignore)


def _plain(name: str) -> str:
    return name.removeprefix("vit.")


def _ours(name: str, value: np.ndarray) -> np.ndarray:
    """A stored tensor as its leaf: kernels ``[in, out]``, tables without the leading one."""
    if name == "embeddings.cls_token":
        return value[0, 0]
    if name == "embeddings.position_embeddings":
        return value[0]
    return value.reshape(len(value), -1).T if value.ndim > 1 else value


def _names(c: VitConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of the file: (leaf, name, stored shape)."""
    d, projection = c.width, "embeddings.patch_embeddings.projection"
    yield "embeddings/cls", "embeddings.cls_token", (1, 1, d)
    yield "embeddings/position/embedding", "embeddings.position_embeddings", (1, c.patches + 1, d)
    yield "embeddings/patch/kernel", f"{projection}.weight", (d, c.channels, c.patch, c.patch)
    yield "embeddings/patch/bias", f"{projection}.bias", (d,)
    sizes = {"ffn/up": (c.ffn, d), "ffn/down": (d, c.ffn)}  # [out, in]
    for layer in range(c.layers):
        for ours, module in _MODULES.items():
            name, norm = f"encoder.layer.{layer}.{module}", ours.endswith("/norm")
            shape = sizes.get(ours, (d, d))
            weight = "scale" if norm else "kernel"
            yield f"layers/{ours}/{weight}", f"{name}.weight", shape[: 2 - norm]
            yield f"layers/{ours}/bias", f"{name}.bias", shape[:1]
    yield "norm/scale", "layernorm.weight", (d,)
    yield "norm/bias", "layernorm.bias", (d,)

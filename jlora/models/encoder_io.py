r"""Encoder weights from and to the directory format of Hugging Face (config and safetensors).

One table says how every leaf of the parameters is called in the file. Kernels are stored
``[out, in]`` there and ``[in, out]`` here, and each layer is its own tensor there:

.. math::
    \mathrm{kernel}_{l,i,o} = \mathrm{weight}^{(l)}_{o,i}

``load(directory)``: ``config.json`` + ``model.safetensors`` -> ``(EncoderConfig, params)``; leaves
keep the dtype of the file (float32, float16 or bfloat16). ``save`` writes the same format back, bit
for bit. Names may carry the prefix ``bert.``; ``gamma``/``beta`` are old names of a norm's
``weight``/``bias``.

Errors: ``ValueError`` naming the tensor, got and expected, for tensors that are missing, surplus
(other than those named by ``ignore``), misshapen, of another dtype or not finite; ``ValueError``
naming the field for a config that this encoder does not implement.

Reference: the published BERT checkpoints.
Deviates: no.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from jlora.models.encoder_config import EncoderConfig, Params
from jlora.models.hf import flatten, read_config, read_leaves

# Parts of a checkpoint the encoder does not have: pooler, pre-training heads, a constant buffer.
IGNORE = r"pooler\..*|cls\..*|embeddings\.position_ids"

_FIELDS = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
    "pad": "pad_token_id",
}
# Fields that change the function and have only one implemented value; absent means that value.
_FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
_EMBEDDINGS = {
    "word/embedding": "word_embeddings.weight",
    "position/embedding": "position_embeddings.weight",
    "type/embedding": "token_type_embeddings.weight",
    "norm/scale": "LayerNorm.weight",
    "norm/bias": "LayerNorm.bias",
}
_MODULES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
    "ffn/norm": "output.LayerNorm",
}


def config_from_hf(directory: str | Path) -> EncoderConfig:
    """Reads ``config.json``.

    Args:
      directory: of the checkpoint.

    Returns:
      The architecture.

    Raises:
      ValueError: a field is missing, or asks for what the encoder does not implement.
    """
    return read_config(directory, EncoderConfig, _FIELDS, _FIXED, ("init_std", "pad"))


def load(directory: str | Path, ignore: str = IGNORE) -> tuple[EncoderConfig, Params]:
    """Reads a checkpoint directory.

    Args:
      directory: holds ``config.json`` and the weights.
      ignore: a regex of names of tensors, less ``bert.``, that are left alone; by default the parts
        that
        the encoder lacks.

    Returns:
      The architecture and the parameters, in the dtype of the file.

    Raises:
      ValueError: as `config_from_hf`; or tensors are missing, surplus, misshapen, of another dtype
        or
        not finite.
    """
    config = config_from_hf(directory)
    expected = list(_names(config))
    flips = {name: flip for _, name, _, flip in expected}

    def ours(name: str, value: np.ndarray) -> np.ndarray:
        return value.T if flips[name] else value

    names = [(leaf, name, shape) for leaf, name, shape, _ in expected]
    return config, read_leaves(directory, names, _plain, ours, ignore)


def save(directory: str | Path, config: EncoderConfig, params: Params) -> None:
    """Writes ``config.json`` and ``model.safetensors``, names without prefix.

    Args:
      directory: made if it does not exist.
      config: the architecture.
      params: its parameters.

    Raises:
      ValueError: a parameter is missing, surplus or misshapen.
    """
    directory = Path(directory)
    flat = flatten(params)
    tensors, counts = {}, dict.fromkeys(flat, 0)
    for leaf, name, shape, flip in _names(config):
        if leaf not in flat:
            raise ValueError(f"params: missing {leaf}")
        value = np.asarray(flat[leaf])
        if leaf.startswith("layers/"):
            if value.shape[0] != config.layers:
                raise ValueError(f"{leaf}: got {value.shape[0]} layers, expected {config.layers}")
            value = value[counts[leaf]]  # _names goes through the layers in order
        counts[leaf] += 1
        value = value.T if flip else value
        if value.shape != shape:
            raise ValueError(f"{leaf} ({name}): got shape {value.shape}, expected {shape}")
        tensors[name] = jnp.asarray(value)
    if surplus := sorted(leaf for leaf, n in counts.items() if not n):
        raise ValueError(f"params: surplus {surplus}")
    directory.mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(config, ours) for ours, name in _FIELDS.items()}
    raw = {"architectures": ["BertModel"], **_FIXED, **fields}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _names(c: EncoderConfig) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    """Every tensor of the file: (leaf, name, stored shape, whether it is stored transposed)."""
    rows = {"word": c.vocab, "position": c.max_positions, "type": c.segments}
    for leaf, name in _EMBEDDINGS.items():
        part = leaf.split("/")[0]
        shape = (c.width,) if part == "norm" else (rows[part], c.width)
        yield f"embeddings/{leaf}", f"embeddings.{name}", shape, False
    sizes = {"ffn/up": (c.ffn, c.width), "ffn/down": (c.width, c.ffn)}  # [out, in]
    for layer in range(c.layers):
        for ours, module in _MODULES.items():
            prefix, norm = f"encoder.layer.{layer}.{module}", ours.endswith("/norm")
            shape = sizes.get(ours, (c.width, c.width))
            weight = "scale" if norm else "kernel"
            yield f"layers/{ours}/{weight}", f"{prefix}.weight", shape[: 2 - norm], not norm
            yield f"layers/{ours}/bias", f"{prefix}.bias", shape[:1], False


def _plain(name: str) -> str:
    name = name.removeprefix("bert.")
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))

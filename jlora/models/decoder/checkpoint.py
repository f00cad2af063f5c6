r"""Decoder weights from and to the directory format of Hugging Face (config and safetensors).

One table says how every leaf of the parameters is called in the file. Kernels are stored
``[out, in]`` there and ``[in, out]`` here, and each layer is its own tensor there. Weights are read
from ``model.safetensors`` or from the shards that ``model.safetensors.index.json`` names, in their
own dtype, and written back bit for bit.

.. math::
    \mathrm{kernel}_{l,i,o} = \mathrm{weight}^{(l)}_{o,i}

Reference: the published checkpoints.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jlora.io import safetensors_file
from jlora.models.decoder.config import DecoderConfig
from jlora.models.decoder.hf_config import config_from_hf, config_to_hf
from jlora.models.hf import INDEX, SINGLE, flatten, read_leaves
from jlora.types import Json, Tree

IGNORE = r".*rotary_emb\.inv_freq"  # constants that old files hold
SHARD = 5 * 10**9  # bytes of one file


def load(directory: str | Path, ignore: str = IGNORE) -> tuple[DecoderConfig, dict[str, Tree]]:
    """Reads a checkpoint directory.

    Args:
      directory: holds ``config.json`` and the weights.
      ignore: a regex of tensors that are left alone; any other surplus one is an error.

    Returns:
      The architecture and the parameters, in the dtype of the file.

    Raises:
      ValueError: as `config_from_hf`; or tensors are missing, surplus, misshapen, of another dtype
        than float32, float16 and bfloat16, or not finite.
    """
    config = config_from_hf(directory)
    table = list(_names(config))
    flips = {name: flip for _, name, _, flip in table}
    if config.tied:
        ignore = rf"(?:{ignore})|lm_head\.weight"  # some writers store the tied table twice
    ours = lambda name, value: value.T if flips[name] else value  # noqa: E731
    names = [(leaf, name, shape) for leaf, name, shape, _ in table]
    return config, read_leaves(directory, names, _plain, ours, ignore)


def save(
    directory: str | Path, config: DecoderConfig, params: dict[str, Tree], shard: int = SHARD
) -> None:
    """Writes ``config.json`` and the weights, which transformers and `load` read.

    Args:
      directory: made if it does not exist.
      config: the architecture.
      params: its parameters.
      shard: bytes of one file at most; larger models come in several, with an index.

    Raises:
      ValueError: a parameter is missing, surplus or misshapen.
    """
    directory = Path(directory)
    flat = {leaf: np.asarray(value) for leaf, value in flatten(params).items()}
    seen = dict.fromkeys(flat, 0)
    files: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for leaf, name, shape, flip in _names(config):
        if leaf not in flat:
            raise ValueError(f"params: {leaf}: missing")
        value = flat[leaf]
        if leaf.startswith("layers/"):
            if len(value) != config.layers:
                raise ValueError(f"{leaf}: got {len(value)} layers, expected {config.layers}")
            value = value[seen[leaf]]  # the table goes through the layers in order
        seen[leaf] += 1
        value = value.T if flip else value
        if value.shape != shape:
            raise ValueError(f"{leaf} ({name}): got shape {value.shape}, expected {shape}")
        if files[-1] and size + value.nbytes > shard:
            files.append({})
            size = 0
        files[-1][name] = value
        size, total = size + value.nbytes, total + value.nbytes
    if surplus := sorted(leaf for leaf, n in seen.items() if not n):
        raise ValueError(f"params: surplus {surplus}")
    directory.mkdir(parents=True, exist_ok=True)
    n = len(files)
    parts = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    for part, tensors in zip(parts, files, strict=True):
        safetensors_file.write(directory / part, tensors, {"format": "pt"})
    if n > 1:
        index = {name: part for part, file in zip(parts, files, strict=True) for name in file}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(directory / "config.json", config_to_hf(config))


def _write_json(path: Path, value: Json) -> None:
    safetensors_file.write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def _plain(name: str) -> str:
    return name.removeprefix("language_model.")


def _names(c: DecoderConfig) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    """Every tensor of the file: (leaf, name, stored shape, whether it is stored transposed)."""
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    modules = {  # ours -> theirs, [out, in], bias
        "attention/query": ("self_attn.q_proj", (q, c.width), c.qkv_bias),
        "attention/key": ("self_attn.k_proj", (kv, c.width), c.qkv_bias),
        "attention/value": ("self_attn.v_proj", (kv, c.width), c.qkv_bias),
        "attention/out": ("self_attn.o_proj", (c.width, q), c.out_bias),
        "ffn/gate": ("mlp.gate_proj", (c.ffn, c.width), c.ffn_bias),
        "ffn/up": ("mlp.up_proj", (c.ffn, c.width), c.ffn_bias),
        "ffn/down": ("mlp.down_proj", (c.width, c.ffn), c.ffn_bias),
    }
    norms = {name: (c.width,) for name in ("input_layernorm", "post_attention_layernorm")}
    if c.post_norms:
        norms |= {f"{place}_feedforward_layernorm": (c.width,) for place in ("pre", "post")}
    yield "embed_tokens/embedding", "model.embed_tokens.weight", (c.vocab, c.width), False
    for i in range(c.layers):
        layer = f"model.layers.{i}"
        for ours, (theirs, shape, bias) in modules.items():
            yield f"layers/{ours}/kernel", f"{layer}.{theirs}.weight", shape, True
            if bias:
                yield f"layers/{ours}/bias", f"{layer}.{theirs}.bias", shape[:1], False
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                weight = f"{layer}.self_attn.{name}.weight"
                yield f"layers/attention/{name}/scale", weight, (c.head_width,), False
        for name, shape in norms.items():
            yield f"layers/{name}/scale", f"{layer}.{name}.weight", shape, False
    yield "norm/scale", "model.norm.weight", (c.width,), False
    if not c.tied:
        yield "lm_head/kernel", "lm_head.weight", (c.vocab, c.width), True

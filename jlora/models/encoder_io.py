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

Source: our reading of the published BERT checkpoints.
Deviates: no.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from jlora.models.encoder_config import EncoderConfig, Params

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
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}

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
    """Read ``config.json``; ``ValueError`` for a missing field or an unimplemented value."""
    path = Path(directory) / "config.json"
    raw = json.loads(path.read_text())
    for field, expected in _FIXED.items():
        if (got := raw.get(field, expected)) != expected:
            raise ValueError(f"{path}: {field}: got {got!r}, expected {expected!r}")
    required = [name for ours, name in _FIELDS.items() if ours not in ("init_std", "pad")]
    if missing := [name for name in required if name not in raw]:
        raise ValueError(f"{path}: missing fields {missing}")
    return EncoderConfig(**{ours: raw[name] for ours, name in _FIELDS.items() if name in raw})


def load(directory: str | Path, ignore: str = IGNORE) -> tuple[EncoderConfig, Params]:
    """Read a checkpoint directory; ``ignore`` is a regex of tensor names (less ``bert.``)."""
    config = config_from_hf(directory)
    path = Path(directory) / "model.safetensors"
    leaves: dict[str, list[np.ndarray]] = {}
    with safe_open(path, framework="flax") as file:
        stored: dict[str, str] = {}
        for name in file.keys():
            if (plain := _plain(name)) in stored:
                raise ValueError(f"{path}: got {plain} twice: {stored[plain]!r} and {name!r}")
            stored[plain] = name
        expected = list(_names(config))
        known = {name for _, name, _, _ in expected}
        missing = sorted(known - stored.keys())
        surplus = sorted(n for n in stored.keys() - known if not re.fullmatch(ignore, n))
        if missing or surplus:
            raise ValueError(f"{path}: missing tensors {missing}, surplus tensors {surplus}")
        for leaf, name, shape, flip in expected:
            value = read_tensor(file, stored[name], shape, path)
            leaves.setdefault(leaf, []).append(value.T if flip else value)
    return config, nest({leaf: stack_leaf(leaf, parts, path) for leaf, parts in leaves.items()})


def save(directory: str | Path, config: EncoderConfig, params: Params) -> None:
    """Write ``config.json`` and ``model.safetensors`` (names without prefix, no pooler)."""
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
    """Every tensor of the file: (our leaf, name, stored shape, whether it is stored transposed)."""
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


def read_tensor(file, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    view = file.get_slice(name)
    if (got := tuple(view.get_shape())) != shape:
        raise ValueError(f"{path}: {name}: got shape {got}, expected {shape}")
    if (dtype := view.get_dtype()) not in _DTYPES:
        raise ValueError(f"{path}: {name}: got dtype {dtype}, expected one of {list(_DTYPES)}")
    value = np.asarray(file.get_tensor(name))
    if not np.isfinite(value).all():
        count = int((~np.isfinite(value)).sum())
        raise ValueError(f"{path}: {name}: got {count} NaN or infinite values, expected none")
    return value


def stack_leaf(leaf: str, parts: list[np.ndarray], path: Path) -> jax.Array:
    if len(dtypes := sorted({str(p.dtype) for p in parts})) > 1:
        raise ValueError(f"{path}: {leaf}: got dtypes {dtypes} over the layers, expected one")
    return jnp.asarray(np.stack(parts) if leaf.startswith("layers/") else parts[0])


def nest(flat: dict[str, jax.Array]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flatten(tree: Params, prefix: str = "") -> dict[str, jax.Array]:
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}/") if inner else {prefix + key: value}
    return flat

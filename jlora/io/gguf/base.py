r"""What a GGUF adapter has to know of its base: the architecture, and how its heads are stored.

llama.cpp calls the tensors of every architecture by one set of names (``blk.3.attn_q``), which the
``gguf`` package maps from those of transformers. In the architecture ``llama`` it stores the output
rows of queries and keys with the two halves of every head interleaved, so that its rotary embedding
turns neighbours; with D the width of a head:

.. math::
    W_{h D + j D/2 + i} = W^{\mathrm{gguf}}_{h D + 2 i + j}, \qquad 0 \le i < D/2,\; j \in \{0, 1\}

Reference: the converters of the ggml project, as the files they write show; tests compare with
llama.cpp itself.
Deviates: only families that `jlora.models.decoder` knows.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jlora.io.errors import FormatError
from jlora.io.gguf.reader import field, is_gguf, open_gguf
from jlora.io.json_file import parse_json
from jlora.io.whole_file import read_bytes
from jlora.types import Json

# model_type of transformers -> architecture of llama.cpp
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
INTERLEAVED = ("llama",)  # architectures whose queries and keys are stored so
TABLE, HEAD = "token_embd", "output"
LAYER = "model.layers.{i}."
MODULES = (  # of all these families, as transformers calls them
    *(f"{LAYER}self_attn.{name}_proj" for name in "qkvo"),
    *(f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down")),
)
MAX_CONFIG = 1 << 20  # bytes of config.json


class GgufBase(NamedTuple):
    """A base model, as far as an adapter file has to know it."""

    architecture: str  # of llama.cpp: "llama", "qwen2", ...
    blocks: int  # layers
    heads: int  # of queries
    kv_heads: int  # of keys
    tied: bool  # whether the embedding table is the output layer as well


def gguf_base(path: str | os.PathLike[str]) -> GgufBase:
    """Reads what is needed of a base.

    Args:
      path: its directory of Hugging Face (``config.json`` alone is read), or its GGUF file.

    Returns:
      The base.

    Raises:
      FormatError: neither, a field that is missing or no count, or an architecture whose tensors
        are not known here.
    """
    return _of_gguf(path) if is_gguf(path) else _of_config(Path(path))


def tensor_names(
    path: str | os.PathLike[str], base: GgufBase, modules: Iterable[str]
) -> dict[str, str]:
    """How llama.cpp calls modules of transformers.

    Args:
      path: of the adapter, for errors.
      base: its base.
      modules: such as ``model.layers.3.self_attn.q_proj``.

    Returns:
      Module -> ``blk.3.attn_q``; modules for which there is no name are left out.

    Raises:
      FormatError: two modules have one name.
    """
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[base.architecture], base.blocks)
    names: dict[str, str] = {}
    for module in modules:
        name = table.get_name(module)
        if name is not None and name in names.values():
            raise FormatError(path, f"{module!r} and another module are both called {name!r}")
        if name is not None:
            names[module] = name
    return names


def modules(base: GgufBase) -> list[str]:
    """The modules of a base that hold a matrix, as transformers calls them.

    Args:
      base: the base.

    Returns:
      Of all layers, then the table and the output layer.
    """
    layers = [name.format(i=i) for i in range(base.blocks) for name in MODULES]
    return [*layers, "model.embed_tokens", "lm_head"]


def heads_of(base: GgufBase, name: str) -> int | None:
    """How many heads of a tensor's output rows are stored interleaved.

    Args:
      base: the base.
      name: of the tensor, such as ``blk.3.attn_q``.

    Returns:
      The number of heads; None where the rows are stored as transformers has them.
    """
    if base.architecture not in INTERLEAVED:
        return None
    return {"attn_q": base.heads, "attn_k": base.kv_heads}.get(name.rpartition(".")[2])


def halves(weight: Shaped[np.ndarray, "out cols"], heads: int) -> Shaped[np.ndarray, "out cols"]:
    """Neighbouring rows (2i, 2i + 1) of every head become its halves (i, i + D/2).

    Args:
      weight: rows of queries or keys as llama.cpp stores them, ``[heads * D, columns]``.
      heads: of this projection.

    Returns:
      The same shape, in the order of transformers.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def neighbours(
    weight: Shaped[np.ndarray, "out cols"], heads: int
) -> Shaped[np.ndarray, "out cols"]:
    """The inverse of `halves`.

    Args:
      weight: rows of queries or keys as transformers has them, ``[heads * D, columns]``.
      heads: of this projection.

    Returns:
      The same shape, in the order of llama.cpp.
    """
    parts = weight.reshape(heads, 2, -1, weight.shape[-1])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def _of_gguf(path: str | os.PathLike[str]) -> GgufBase:
    reader = open_gguf(path)
    architecture = field(path, reader, "general.architecture")
    if architecture not in FAMILIES.values():
        raise _unknown(path, "general.architecture", architecture, set(FAMILIES.values()))
    blocks, heads = (
        field(path, reader, f"{architecture}.{name}")
        for name in ("block_count", "attention.head_count")
    )
    kv_heads = field(path, reader, f"{architecture}.attention.head_count_kv", heads)
    tied = all(t.name != f"{HEAD}.weight" for t in reader.tensors)
    return _checked(path, GgufBase(architecture, blocks, heads, kv_heads, tied))


def _of_config(folder: Path) -> GgufBase:
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(folder, "neither a GGUF file nor a directory with config.json")
    raw = parse_json(path, read_bytes(path, MAX_CONFIG))
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or family not in FAMILIES:
        raise _unknown(path, "model_type", family, FAMILIES)
    counts: dict[str, Json] = {
        "blocks": raw.get("num_hidden_layers"),
        "heads": raw.get("num_attention_heads"),
        "kv_heads": raw.get("num_key_value_heads") or raw.get("num_attention_heads"),
    }
    base = GgufBase(
        FAMILIES[family],
        **counts,
        tied=bool(raw.get("tie_word_embeddings", family.startswith("gemma"))),
    )
    return _checked(path, base)


def _unknown(
    path: str | os.PathLike[str], name: str, got: Json, known: Iterable[str]
) -> FormatError:
    return FormatError(path, f"{name}: got {got!r}, expected one of {sorted(known)}")


def _checked(path: str | os.PathLike[str], base: GgufBase) -> GgufBase:
    for name in ("blocks", "heads", "kv_heads"):
        count = getattr(base, name)
        if type(count) is not int or not 0 < count < 1 << 16:
            raise FormatError(path, f"{name}: got {count!r}, expected a positive number")
    return base

r"""A decoder from a GGUF file of llama.cpp: its weights dequantised, its tokenizer, its template.

Only the ``llama`` architecture (Llama, SmolLM, Mistral). llama.cpp stores queries and keys with the
two halves of every head interleaved, head by head; they are put back:

.. math::
    W_{h D + j D/2 + i} = W^{\mathrm{gguf}}_{h D + 2 i + j}, \qquad 0 \le i < D/2,\; j \in \{0, 1\}

(`jlora.io.gguf`, which reads and writes adapters in this format.)
Reading and dequantising are done by the ``gguf`` package (``pip install gguf``).

Reference: the GGUF specification of the ggml project, version 3.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora.io.gguf.base import halves
from jlora.io.gguf.reader import field, open_gguf
from jlora.models.decoder.config import DecoderConfig, Rope
from jlora.models.hf import nest
from jlora.types import Dynamic, Tree

MODULES = {
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/out": "attn_output",
    "ffn/gate": "ffn_gate",
    "ffn/up": "ffn_up",
    "ffn/down": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def load_gguf(path: str | Path) -> tuple[DecoderConfig, dict[str, Tree]]:
    """Reads the architecture and the weights, float32.

    Args:
      path: the ``.gguf`` file.

    Returns:
      The architecture and the parameters, as `jlora.models.decoder.load` gives them.

    Raises:
      ValueError: no GGUF file, another architecture, a tensor or field that is missing, surplus or
        misshapen, a scaled rotary embedding, or values that are not finite.
    """
    reader = open_gguf(path)
    config = _config(path, reader)
    from gguf.quants import dequantize

    tensors = {t.name: t for t in reader.tensors}
    used = set()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path}: {name}: missing")
        used.add(name)
        value = dequantize(tensors[name].data, tensors[name].tensor_type)
        if value.shape != shape:
            raise ValueError(f"{path}: {name}: got shape {value.shape}, expected {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name}: has values that are NaN or infinite")
        return value.astype(np.float32)

    c = config
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    shapes = {
        "attention/query": (q, c.width),
        "attention/key": (kv, c.width),
        "attention/value": (kv, c.width),
        "attention/out": (c.width, q),
        "ffn/gate": (c.ffn, c.width),
        "ffn/up": (c.ffn, c.width),
        "ffn/down": (c.width, c.ffn),
    }
    heads = {"attention/query": c.heads, "attention/key": c.kv_heads}
    flat: dict[str, np.ndarray] = {}
    for ours, theirs in MODULES.items():
        layers = [read(f"blk.{i}.{theirs}.weight", shapes[ours]) for i in range(c.layers)]
        if ours in heads:
            layers = [halves(w, heads[ours]) for w in layers]
        flat[f"layers/{ours}/kernel"] = np.stack([w.T for w in layers])
    for ours, theirs in NORMS.items():
        names = [f"blk.{i}.{theirs}.weight" for i in range(c.layers)]
        flat[f"layers/{ours}/scale"] = np.stack([read(name, (c.width,)) for name in names])
    flat["embed_tokens/embedding"] = read("token_embd.weight", (c.vocab, c.width))
    flat["norm/scale"] = read("output_norm.weight", (c.width,))
    if not c.tied:
        flat["lm_head/kernel"] = read("output.weight", (c.vocab, c.width)).T
    if surplus := sorted(tensors.keys() - used - {"rope_freqs.weight"}):
        raise ValueError(f"{path}: got surplus tensors {surplus[:5]}")
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: rope_freqs.weight: scaled rotary embeddings are not read")
    return config, nest({name: jnp.asarray(value) for name, value in flat.items()})


def gguf_config(path: str | Path) -> DecoderConfig:
    """The architecture alone, as `load_gguf` gives it.

    Args:
      path: the ``.gguf`` file.

    Returns:
      The config.

    Raises:
      ValueError: as `load_gguf`.
    """
    return _config(path, open_gguf(path))


def gguf_tokenizer(path: str | Path) -> Dynamic:
    """The byte-level BPE tokenizer in the file, as a ``tokenizers.Tokenizer``.

    Args:
      path: the ``.gguf`` file.

    Returns:
      The tokenizer, with the file's special tokens.

    Raises:
      ValueError: the file holds a tokenizer of another kind than "gpt2" with the pre-tokenizer
        "smollm" or "gpt-2".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = open_gguf(path)
    kind, split = (field(path, reader, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or split not in ("smollm", "gpt-2"):
        raise ValueError(f"{path}: tokenizer: got {kind}/{split}, expected gpt2/smollm or gpt-2")
    tokens, types, merges = (
        field(path, reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    fast = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_]) if split == "smollm" else bytes_
    fast.decoder = decoders.ByteLevel()
    special = [t for t, k in zip(tokens, types, strict=True) if k == 3]
    fast.add_special_tokens([AddedToken(t, special=True) for t in special])
    return fast


def chat_template(path: str | Path) -> str:
    """The chat template in the file.

    Args:
      path: the ``.gguf`` file.

    Returns:
      A Jinja template; "" where the file holds none.

    Raises:
      ValueError: not a GGUF file.
    """
    entry = open_gguf(path).get_field("tokenizer.chat_template")
    return str(entry.contents()) if entry is not None else ""


def _config(path: str | Path, reader: Dynamic) -> DecoderConfig:
    if (kind := field(path, reader, "general.architecture")) != "llama":
        raise ValueError(f"{path}: general.architecture: got {kind!r}, expected 'llama'")
    get = lambda name, default=None: field(path, reader, f"llama.{name}", default)  # noqa: E731
    if (scaling := get("rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path}: llama.rope.scaling.type: got {scaling!r}, expected 'none'")
    if experts := get("expert_count", 0):
        raise ValueError(f"{path}: llama.expert_count: got {experts}, expected 0")
    names = {t.name for t in reader.tensors}
    width, heads = get("embedding_length"), get("attention.head_count")
    return DecoderConfig(
        model_type="llama",
        vocab=len(field(path, reader, "tokenizer.ggml.tokens")),
        layers=get("block_count"),
        width=width,
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_width=get("rope.dimension_count", width // heads),
        ffn=get("feed_forward_length"),
        max_positions=get("context_length"),
        rope=Rope(float(get("rope.freq_base", 10_000.0))),
        tied="output.weight" not in names,
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
    )

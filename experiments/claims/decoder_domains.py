r"""Eight kinds of text for base L, an adapter of each, and sequences that turn from kind to kind.

==========  ==============================================================================
D           kinds of text, D = 8: chapters, addresses, tales, scripts, newswire, ...
A_d         LoRA of rank r on all kernels of base L, trained on rows of kind d alone
row         `SEGMENTS` pieces of `SEGMENT` tokens, each of another kind drawn by chance
==========  ==============================================================================

Adapters are trained by Adam with a linear decay. Test rows are the same for all seeds, made of
documents or texts that nothing was trained on; so are validation rows, of other pieces.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.data.tasks import label_texts
from experiments.pretraining import base_l, texts, tokens
from jlora.models import decoder

DOCUMENTS = ("moby_dick", "sotu", "grimm", "friends")
LABELS = (
    *(("reuters_r8", "acq"), ("20newsgroups", "comp.graphics")),
    *(("vader_tweets", "positive"), ("spam", "spam")),
)
NAMES = (*DOCUMENTS, *(f"{corpus}/{label}" for corpus, label in LABELS))
ASSETS = ("stdlib_texts", "orange_texts", "orange", "vader", "stdlib")
KERNELS = r"layers/(attention|ffn)/\w+/kernel"
RANK, STEPS, BATCH, RATE = 8, 40, 4, 3e-3  # of the adapters
SEGMENT, SEGMENTS = 32, 4
VALIDATION, TEST = 16, 48  # rows


class Rows(NamedTuple):
    """Sequences of several kinds of text."""

    ids: np.ndarray  # int32 [rows, length + 1]
    kind: np.ndarray  # int32 [rows, length + 1], of each token


class World(NamedTuple):
    """Base L, and text of each kind."""

    config: decoder.DecoderConfig
    params: Any
    train: tuple[np.ndarray, ...]  # D streams of tokens, int32
    validation: Rows
    test: Rows


def streams(tokenizer: Any, held_out: bool) -> list[np.ndarray]:
    """Tokens of each kind of text, texts one after the other.

    Args:
      tokenizer: of base L.
      held_out: whether of documents and texts that are only measured on.
    """
    every = texts.documents(DOCUMENTS)
    found = [tokens.stream(tokenizer, [d for d in every if d.source == source], held_out)
             for source in DOCUMENTS]  # fmt: skip
    end = tokenizer.token_to_id(tokens.END)
    for corpus, label in LABELS:
        lines = label_texts(corpus, label, "test" if held_out else "train")
        encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
        found.append(np.concatenate([[*e.ids, end] for e in encoded]))
    return [x.astype(np.int32) for x in found]


def composed(pieces: list[np.ndarray], count: int, draw: np.random.Generator) -> Rows:
    """Rows whose segments are of kinds drawn without repetition.

    Args:
      pieces: a stream of each kind.
      count: rows.
      draw: source of chance.
    """
    size = SEGMENT * SEGMENTS + 1
    ids, kind = np.empty((count, size), np.int32), np.empty((count, size), np.int32)
    for row in range(count):
        chosen = draw.choice(len(pieces), SEGMENTS, replace=False)
        for n, d in enumerate(chosen):
            length = SEGMENT + (n == SEGMENTS - 1)  # the last token is only predicted
            at = slice(n * SEGMENT, n * SEGMENT + length)
            start = draw.integers(0, len(pieces[d]) - length + 1)
            ids[row, at], kind[row, at] = pieces[d][start : start + length], d
    return Rows(ids, kind)


@functools.cache
def world() -> World:
    """All kinds of text; measured rows are drawn once."""
    base = base_l.load()
    train, held_out = (streams(base.tokenizer, kind) for kind in (False, True))
    half = [len(x) // 4 for x in held_out]  # the first quarter of each is for validation
    few = composed([x[:n] for x, n in zip(held_out, half, strict=True)], VALIDATION,
                   np.random.default_rng(101))  # fmt: skip
    many = composed([x[n:] for x, n in zip(held_out, half, strict=True)], TEST,
                    np.random.default_rng(102))  # fmt: skip
    return World(base.config, base.params, tuple(train), few, many)


def nats(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Cross entropy of all tokens but the first, [rows, length]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])


@functools.cache
def run_of(config: decoder.DecoderConfig) -> Any:
    """(params, ids) -> logits; one function per architecture, so that jit knows it again."""
    return lambda params, ids: decoder.forward(params, ids, config=config).logits


def fresh(config: decoder.DecoderConfig, params: Any, method: Any, seed: int) -> jl.Adapter:
    """A method at its start on all kernels of the layers."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    methods = {KERNELS: method}
    return jl.init(jax.random.key(seed), run_of(config), params, ids, methods=methods)


@functools.cache
def _step(config: decoder.DecoderConfig):
    def step(params, adapter, state, ids, rate):
        def loss(trainable):
            merged = jl.merge(params, adapter.replace(trainable=trainable))
            return nats(run_of(config)(merged, ids[:, :-1]), ids).mean()

        value, grads = jax.value_and_grad(loss)(adapter.trainable)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        moved = jax.tree.map(lambda p, u: p - rate * u, adapter.trainable, updates)
        return adapter.replace(trainable=moved), state, value

    return jax.jit(step)


@functools.cache
def own(kind: int, seed: int) -> jl.Adapter:
    """The adapter of a kind of text."""
    found = world()
    adapter = fresh(found.config, found.params, jl.LoRA(RANK, alpha=float(RANK)), seed)
    state = optax.scale_by_adam().init(adapter.trainable)
    step, size = _step(found.config), SEGMENT * SEGMENTS + 1
    for number in range(STEPS):
        draw = np.random.default_rng([seed, kind, number])
        starts = draw.integers(0, len(found.train[kind]) - size + 1, BATCH)
        ids = found.train[kind][starts[:, None] + np.arange(size)[None]]
        adapter, state, _ = step(found.params, adapter, state, ids, RATE * (1 - number / STEPS))
    return adapter


@functools.cache
def _measure(config: decoder.DecoderConfig):
    def measure(params, adapter, ids):
        whole = params if adapter is None else jl.merge(params, adapter)
        logits = run_of(config)(whole, ids[:, :-1])
        return nats(logits, ids), logits.argmax(-1).astype(jnp.int32) == ids[:, 1:]

    return jax.jit(measure)


def measured(adapter: jl.Adapter | None, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each token, and whether it was the most likely one, [rows, length] each.

    Args:
      adapter: LoRA; None: base L alone.
      rows: of several kinds of text.
    """
    found = world()
    loss, right = _measure(found.config)(found.params, adapter, rows.ids)
    return np.asarray(loss), np.asarray(right)

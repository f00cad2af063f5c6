r"""The layered generator of a world: read the base's layers, remember the seen classes.

========  ======================================================================================
f_k       what enters the output matrix of the feed-forward part of layer k, mean over tokens [m]
e         embedding of a text, [d]
J_k       derivative of e by a constant that is added to all tokens before that layer's last norm
========  ======================================================================================

All three are of the layers that may carry adapters, L of them. Nothing is trained: one pass over
the training texts of the seen tasks gives `jlora.generation.generators.layered` what it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.progress import Progress
from experiments.stages.world import Rows, World, classifier
from jlora.generation.generators import class_memory, layer_reading, layered
from jlora.generation.generators.class_memory import Memory
from jlora.generation.generators.layer_reading import Reading
from jlora.generation.generators.layered import Layered, LayeredConfig
from jlora.models import encoder, layers

PyTree = Any
CONFIG = LayeredConfig()
SITE = "layers/ffn/down/kernel"
TURNED = 24  # texts behind the mean derivative
FEWEST = 16  # texts of a class that is remembered


class Fitted(NamedTuple):
    """What the generator knows of a base and of the seen tasks."""

    reading: Reading
    known: Memory | None  # None: fewer than three classes were seen


class Read(NamedTuple):
    """What the base says of n texts."""

    features: np.ndarray  # [n, L, m] f
    embeddings: np.ndarray  # [n, d] e


def _layers(
    model: encoder.EncoderConfig, upper: PyTree, hidden: jax.Array, mask: jax.Array, shift: Any
) -> tuple[jax.Array, jax.Array]:
    """(states after the last layer [n, t, d], f [L, n, m]), with a constant [L, d] added."""
    attention, ffn = encoder.Attention(model), encoder.FeedForward(model)
    bias, weight = layers.mask_bias(mask), mask.astype(hidden.dtype)
    count = jnp.maximum(weight.sum(1), 1.0)[:, None]

    def one(h: jax.Array, given: tuple[PyTree, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params, own = given
        u: Any = attention.apply({"params": params["attention"]}, h, bias)
        _, kept = ffn.apply(
            {"params": params["ffn"]}, u, capture_intermediates=True, mutable=["intermediates"]
        )
        tables: Any = kept["intermediates"]
        (up,), (down,) = (tables[name]["__call__"] for name in ("up", "down"))
        norm = params["ffn"]["norm"]
        after = layers.layer_norm(
            u + down + own[None, None], norm["scale"], norm["bias"], model.norm_eps
        )
        return after, jnp.einsum("ntm,nt->nm", layers.gelu(up), weight) / count

    return jax.lax.scan(one, hidden, (upper["layers"], shift))


def _nothing(model: encoder.EncoderConfig, upper: PyTree) -> jax.Array:
    depth = jax.tree.leaves(upper["layers"])[0].shape[0]
    return jnp.zeros((depth, model.width))


@functools.partial(jax.jit, static_argnums=0)
def _read(
    model: encoder.EncoderConfig, upper: PyTree, hidden: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    after, features = _layers(model, upper, hidden, mask, _nothing(model, upper))
    return jnp.swapaxes(features, 0, 1), encoder.mean_pool(after, mask)


@functools.partial(jax.jit, static_argnums=0)
def _derivative(
    model: encoder.EncoderConfig, upper: PyTree, hidden: jax.Array, mask: jax.Array
) -> jax.Array:
    def embedding(shift: jax.Array) -> jax.Array:
        after, _ = _layers(model, upper, hidden[None], mask[None], shift)
        return encoder.mean_pool(after, mask[None])[0]

    return jnp.swapaxes(jax.jacrev(embedding)(_nothing(model, upper)), 0, 1)  # [L, d, d]


def batches(world: World, index: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """(rows of texts, how many are no padding) of texts, `eval_rows` at a time."""
    size = world.config.eval_rows
    for start in range(0, len(index), size):
        part = index[start : start + size]
        yield np.resize(part, size), len(part)


def read(world: World, index: np.ndarray) -> Read:
    """Features of all layers and embeddings of texts.

    Args:
      world: base and texts.
      index: rows of the texts, [n].
    """
    parts = []
    for rows, real in batches(world, index):
        outputs = _read(world.model, world.upper, world.hidden[rows], world.mask[rows])
        parts.append([np.asarray(x)[:real] for x in outputs])
    return Read(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def derivatives(world: World, index: np.ndarray, bar: Progress) -> np.ndarray:
    """J, mean over texts, [L, d, d]. Each is a step of the bar."""
    total: Any = 0.0
    for row in index:
        given = world.hidden[row], world.mask[row]
        total = total + np.asarray(_derivative(world.model, world.upper, *given), np.float64)
        bar.step(1)
    return total / len(index)


def classes(world: World, names: Sequence[str]) -> list[np.ndarray]:
    """Training texts of every class that some tasks have.

    A class is a label of a corpus, or one side of a kind of task that has no labels. A side of
    several labels, which is the rest of its corpus, is none.

    Args:
      world: of all tasks.
      names: of the tasks.

    Returns:
      Rows of the texts of each class that has enough of them, [n_j].
    """
    members_of: dict[Any, set[int]] = {}
    for name in names:
        task, rows = world.task(name), world.rows[name, "train"]
        for side in range(task.classes):
            members = task.members[side]
            key = members or (task.corpus, task.class_descriptions[side])
            if len(members) < 2:
                members_of.setdefault(key, set()).update(rows.index[rows.label == side].tolist())
    return [np.asarray(sorted(own)) for own in members_of.values() if len(own) >= FEWEST]


def fit(world: World, names: Sequence[str], bar: Progress) -> Fitted:
    """The generator of some tasks.

    Args:
      world: of all tasks.
      names: of the tasks whose training texts may be read.
      bar: of `TURNED` + 1 steps.

    Returns:
      How the base is read, and the classes of those tasks.
    """
    own = classes(world, names)
    every = np.unique(np.concatenate([world.rows[name, "train"].index for name in names]))
    texts = read(world, every)
    bar.step(1)
    rng = np.random.default_rng([world.config.seed, 7])
    turned = rng.permutation(every)[:TURNED]
    derivative = derivatives(world, np.resize(turned, TURNED), bar)
    reading = layer_reading.reading(texts.features, texts.embeddings, derivative)
    if len(own) < 3:
        return Fitted(reading, None)
    place = np.searchsorted(every, np.concatenate(own))
    label = np.repeat(np.arange(len(own)), [len(part) for part in own])
    rows = jnp.asarray(texts.features[place])
    embedding, x = (np.asarray(t) for t in layer_reading.seen(reading, rows, CONFIG.share))
    return Fitted(reading, class_memory.memory(embedding, x, label))


def template(world: World, count: int) -> jl.Adapter:
    """A fresh adapter with a rank for each class of a task, scale 1."""
    method = jl.LoRA(rank=count, alpha=float(count))
    apply = classifier(world.model, world.config.head_scale)
    rows = (world.hidden[:1], world.mask[:1], jnp.asarray(world.heads[:1]))
    return jl.init(jax.random.key(0), apply, world.upper, *rows, methods={SITE: method})


_solve = jax.jit(layered.solution)


def factors(
    world: World, fitted: Fitted, features: np.ndarray, labels: np.ndarray, head: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """(a [L, m, C], b [L, C, d]) of examples, scale included.

    Args:
      world: of the base.
      fitted: the generator.
      features: f of the examples, [n, L, m].
      labels: class of each, [n].
      head: class vectors of the task, [C, d].
    """
    heads = jnp.asarray(head)
    state = Layered(fitted.reading, fitted.known, heads, template(world, len(head)), CONFIG, 0)
    given = jnp.asarray(features), jnp.asarray(labels), jnp.ones(len(labels))
    return _solve(state, *given, heads)


def adapter(world: World, a: jax.Array, b: jax.Array) -> jl.Adapter:
    """Factors of `factors` as an ordinary adapter of the base."""
    return layered.written(template(world, b.shape[1]), SITE, a, b)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(
    model: encoder.EncoderConfig, scale: float, upper: PyTree, delta: jax.Array, *rows: jax.Array
) -> jax.Array:
    ffn = upper["layers"]["ffn"]
    down = {**ffn["down"], "kernel": ffn["down"]["kernel"] + delta}
    tuned = {**upper, "layers": {**upper["layers"], "ffn": {**ffn, "down": down}}}
    hidden, mask, head = rows
    wide = jnp.broadcast_to(head[None], (len(hidden), *head.shape))
    return classifier(model, scale)(tuned, hidden, mask, wide).argmax(-1)


def right(world: World, rows: Rows, head: np.ndarray) -> Callable[..., np.ndarray]:
    """(a, b) -> which rows the adapted base gets right, bool [n].

    Args:
      world: base and texts.
      rows: labelled texts.
      head: class vectors, [C, d].
    """
    model, scale = world.model, world.config.head_scale

    def hits(a: jax.Array, b: jax.Array) -> np.ndarray:
        delta, answers = a @ b, []
        for at, real in batches(world, rows.index):
            given = world.hidden[at], world.mask[at], jnp.asarray(head)
            answers.append(np.asarray(_answers(model, scale, world.upper, delta, *given))[:real])
        return np.concatenate(answers) == rows.label

    return hits

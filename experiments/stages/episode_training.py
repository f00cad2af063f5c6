"""Training of the episodic generator: rounds of steps, statistics of the features between them.

A step draws tasks, corpora with many tasks less often (by one over the square root of their
number), and of each task K examples and other texts of every class. The covariance of the features
belongs to the shared adapter, so it is computed anew after each round. Steps draw from (seed,
round, step), and each round is a resumable loop of its own: a killed run ends bitwise the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.progress import Progress
from experiments.stages import conditions, last_layer, train_loop
from experiments.stages.world import World, classifier
from jlora.generation.generators import episodic
from jlora.generation.generators.episodic import Episode, Learned, Statistics
from jlora.models import encoder

PyTree = Any
PATH = "layers/ffn/down/kernel"
SITES = r"layers/(attention/(query|key|value|out)|ffn/(up|down))/kernel"
ROUND = 40  # steps between statistics
EXAMPLES = (2, 4, 8)  # K of an episode, of each class
QUERIES = 12  # other texts of an episode, of each class
TEXTS = 24  # of each class, behind the covariance
FASTER = 10.0  # rate of shrinkage, ridge and gain over that of the factors
START = episodic.EpisodicConfig(site=PATH, shrinkage=1.0, ridge=10.0, gain=1.0)


class Fitted(NamedTuple):
    """The generator."""

    learned: Learned  # shared adapter, shrinkage, ridge and gain
    texts: Statistics  # of the features under that adapter


class Data(NamedTuple):
    """What a step reads; arrays only."""

    table: conditions.Table  # texts and heads of the tasks
    odds: jax.Array  # [n] logarithm of how often each is drawn
    upper: PyTree
    hidden: jax.Array  # [N, t, d]
    mask: jax.Array  # [N, t]
    template: jl.Adapter
    texts: Statistics


class Plan(NamedTuple):
    """Every setting that a step reads; static."""

    model: encoder.EncoderConfig
    head_scale: float
    rate: float
    steps: int  # of the schedule
    tasks: int  # per step


def template(world: World, classes: int = 0) -> jl.Adapter:
    """A fresh adapter of all matrices, with ranks for the classes of a task (0: of all tasks)."""
    rank = world.config.episode_rank + (classes or world.classes)
    method = jl.LoRA(rank=rank, alpha=float(rank))
    apply = classifier(world.model, world.config.head_scale)
    rows = (world.hidden[:1], world.mask[:1], jnp.asarray(world.heads[:1]))
    key = jax.random.key(world.config.seed)
    return jl.init(key, apply, world.upper, *rows, methods={SITES: method})


def resized(shared: jl.Adapter, like: jl.Adapter) -> jl.Adapter:
    """The shared adapter with the ranks of another template: its own first, the rest zero."""

    def fit(old: jax.Array, new: jax.Array) -> jax.Array:
        part = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
        return jnp.zeros_like(new).at[part].set(old[part])

    return like.replace(trainable=jax.tree.map(fit, shared.trainable, like.trainable))


def parted(world: World, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(tasks to train, tasks of every third corpus by name); the latter choose the steps."""
    corpora = sorted({world.task(name).corpus for name in names})
    out = set(corpora[1::3])
    touched = {
        name: {corpus for side in world.task(name).members for corpus, _ in side} | {
            world.task(name).corpus
        }
        for name in names
    }  # fmt: skip
    kept = [name for name in names if not touched[name] & out]
    rest = [name for name in names if touched[name] & out]
    return (kept, rest) if kept else (list(names), [])


def statistics(world: World, names: Sequence[str], shared: PyTree) -> Statistics:
    """Of training texts of these tasks under the shared adapter."""
    groups: dict[Any, np.ndarray] = {}
    for name in names:
        task, rows = world.task(name), world.rows[name, "train"]
        for side in range(task.classes):
            key = task.members[side] or (name, side)
            groups.setdefault(key, np.unique(rows.index[rows.label == side])[:TEXTS])
    theta = template(world).replace(trainable=shared)
    there = world._replace(upper=jl.merge(world.upper, theta))
    index = np.concatenate(list(groups.values()))
    label = np.repeat(np.arange(len(groups)), [len(own) for own in groups.values()])
    return episodic.statistics(last_layer.features(there, index), label)


def refreshed(world: World, names: Sequence[str], fitted: Fitted) -> Fitted:
    """The same with the statistics of its own shared adapter."""
    return fitted._replace(texts=statistics(world, names, fitted.learned.shared))


def initial(world: World) -> Learned:
    """A shared adapter that changes nothing, and where the three numbers start."""
    numbers = (START.shrinkage, START.ridge, START.gain)
    return Learned(template(world).trainable, *(jnp.log(jnp.float32(x)) for x in numbers))


def empty(world: World) -> Fitted:
    """Shapes of the generator."""
    learned, m = initial(world), world.model.ffn
    shapes = (m, m), (m,), (m,)
    return jax.eval_shape(
        lambda: Fitted(learned, Statistics(*(jnp.zeros(s, jnp.float32) for s in shapes)))
    )


def rounds(
    world: World, names: Sequence[str], steps: int, folder: Path, bar: Progress
) -> Iterator[Fitted]:
    """The generator before training and after each round of at most `ROUND` steps."""
    config = world.config
    plan = Plan(world.model, config.head_scale, config.episode_lr, steps, config.episode_tasks)
    learned: Any = initial(world)
    fitted = refreshed(world, names, Fitted(learned, empty(world).texts))
    yield fitted
    if not steps:
        return
    moments, count = _solver(plan).init(learned), 0
    number = Counter(world.task(name).corpus for name in names)
    odds = [-0.5 * np.log(number[world.task(name).corpus]) for name in names]
    data = Data(
        conditions.table(world, names), jnp.asarray(odds, jnp.float32), world.upper, world.hidden,
        world.mask, template(world), fitted.texts,
    )  # fmt: skip
    key, state = jax.random.key(config.seed), (learned, moments)
    while count < steps:
        length = min(ROUND, steps - count)
        state, _ = train_loop.train(
            step(plan), state, data, jax.random.fold_in(key, count), steps=length, chunk=length,
            save_every=length, folder=folder / f"from_{count}", bar=bar, label="episodes",
        )  # fmt: skip
        count += length
        fitted = refreshed(world, names, Fitted(state[0], data.texts))
        data = data._replace(texts=fitted.texts)
        yield fitted


def _solver(plan: Plan) -> optax.GradientTransformation:
    low, warm = plan.rate / 10, max(1, plan.steps // 16)
    slow = optax.warmup_cosine_decay_schedule(low, plan.rate, warm, max(plan.steps, 2), low)
    which = Learned("factors", "numbers", "numbers", "numbers")  # pyright: ignore[reportArgumentType]
    parts: dict[Any, Any] = {
        "factors": optax.adam(slow),
        "numbers": optax.adam(lambda n: FASTER * slow(n)),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(parts, which))


@functools.cache
def step(plan: Plan) -> train_loop.Step:
    """A step of the loop; one function per plan, so that it is compiled once."""
    read = jl.lift(functools.partial(last_layer.pooled, plan.model), unread="allow")
    tuned = jl.lift(classifier(plan.model, plan.head_scale))

    def update(state: PyTree, data: Data, key: jax.Array) -> tuple[PyTree, dict[str, jax.Array]]:
        learned, moments = state  # Learned, and optax's
        key_task, key_rows = jax.random.split(key)
        tasks = jax.random.categorical(key_task, data.odds, shape=(plan.tasks,))
        keys = jax.random.split(key_rows, plan.tasks)
        drawn = jax.vmap(functools.partial(draw, data))(keys, tasks)

        def features(theta: jl.Adapter, rows: Any) -> jax.Array:
            return read(data.upper, theta, *rows)

        def logits(generated: jl.Adapter, rows: Any, head: jax.Array) -> jax.Array:
            wide = jnp.broadcast_to(head, (len(rows[0]), *head.shape))
            return tuned(data.upper, generated, *rows, wide)

        def mean(learned: Learned) -> jax.Array:
            def one(episode: Episode) -> jax.Array:
                fixed = episodic.Episodic(
                    learned, data.texts, episode.heads, data.template, START, 0
                )
                return episodic.loss(learned, fixed, episode, features, logits)

            return jnp.mean(jax.vmap(one)(drawn))

        value, slope = jax.value_and_grad(mean)(learned)
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = _solver(plan).update(slope, moments, learned)
        learned: Any = optax.apply_updates(learned, updates)
        numbers = {"loss": value, "gain": jnp.exp(learned.log_gain)}
        return (learned, moments), numbers

    return update


def draw(data: Data, key: jax.Array, task: jax.Array) -> Episode:
    """An episode of one task: K of `EXAMPLES`, no text both example and query where there are
    enough of them."""
    key_k, key_order = jax.random.split(key)
    most, table = max(EXAMPLES), data.table
    counts = table.counts[task]  # [C]
    order = jax.random.uniform(key_order, table.members.shape[1:])
    there = jnp.arange(order.shape[1])[None] < counts[:, None]
    order = jnp.argsort(jnp.where(there, order, 2 + order), axis=1)
    place = jnp.arange(most + QUERIES)[None] % jnp.maximum(counts, 1)[:, None]
    rows = jnp.take_along_axis(table.members[task], jnp.take_along_axis(order, place, 1), axis=1)
    classes = len(counts)
    k = jax.random.choice(key_k, jnp.asarray(EXAMPLES, jnp.int32))
    used = (jnp.arange(most)[None] < k) & (counts > 0)[:, None]
    own = jnp.sum(counts > 0)
    answer = jnp.arange(classes * QUERIES) % own  # classes that the task has, in turn
    at = jnp.arange(classes * QUERIES) // own % QUERIES
    support, query = rows[:, :most].reshape(-1), rows[answer, most + at]

    def texts(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return data.hidden[index], data.mask[index]

    return Episode(
        texts(support), jnp.repeat(jnp.arange(classes), most),
        used.reshape(-1).astype(jnp.float32), texts(query), answer, table.heads[task],
    )  # fmt: skip

"""Task conditions as arrays: what a generator may know of a task.

A condition is [2 C, E]: (description, mean of K examples) of class 0, of class 1, ..., each an
embedding of the frozen base, centred and scaled with statistics of the seen tasks. C is that of the
task that has most classes; vectors of classes that a task does not have are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.task import FEWEST
from experiments.stages.world import Rows, World, condition, draw, padded
from experiments.workdir import StageError


class Table(NamedTuple):
    """Lookup arrays for conditions and training rows of n tasks."""

    words: jax.Array  # [n, C, P, E] embeddings of the description and its paraphrases
    members: jax.Array  # [n, C, M] int32 training rows of each class (repeated to fill M)
    counts: jax.Array  # [n, C] int32 how many of them are real; 0: no such class
    heads: jax.Array  # [n, C, d] frozen class vectors


class Scaling(NamedTuple):
    """Statistics of the seen tasks' canonical conditions."""

    mean: jax.Array  # [2 C, E], each over the tasks that have the class
    scale: jax.Array  # [] root mean square after centring


def table(world: World, names: Sequence[str]) -> Table:
    """The table of these tasks, in this order."""
    # A user's task may have more: none is left out.
    most = max(world.config.train_texts, *(_largest_class(world, name) for name in names))
    words, members, counts, heads = [], [], [], []
    for name in names:
        task = world.task(name)
        rows = world.rows[name, "train"]
        sides, sizes, texts = [], [], []
        for side in range(task.classes):
            own = rows.index[rows.label == side]
            if len(own) == 0:
                raise StageError(f"task '{name}' has no training text of class {side}")
            sides.append(np.resize(own, most))
            sizes.append(len(own))
            phrases = (task.class_descriptions[side], *task.paraphrases[side])[:2]
            phrases = phrases if len(phrases) == 2 else phrases * 2
            texts.append(np.stack([world.text[p] for p in phrases]))
        none = world.classes - task.classes
        members.append(np.stack(sides + [np.zeros_like(sides[0])] * none))
        counts.append(sizes + [0] * none)
        words.append(np.stack(texts + [np.zeros_like(texts[0])] * none))
        heads.append(world.head_of(name))
    return Table(
        jnp.asarray(np.stack(words)),
        jnp.asarray(np.stack(members), jnp.int32),
        jnp.asarray(np.asarray(counts), jnp.int32),
        jnp.asarray(np.stack(heads)),
    )


def _largest_class(world: World, name: str) -> int:
    return int(np.bincount(world.rows[name, "train"].label).max())


def canonical(world: World, names: Sequence[str], paraphrase: int = 0) -> np.ndarray:
    """[n, 2 C, E] raw conditions of tasks with their K fixed examples."""
    config = world.config
    out = []
    for name in names:
        task = world.task(name)
        number = min(paraphrase, *map(len, task.paraphrases))
        if paraphrase and not number:
            raise StageError(f"task '{name}' has no paraphrase of its description")
        if task.level == "user":
            raw = condition(of_examples(world, name), task, None, number)
        else:
            raw = condition(world, task, draw(config, name, config.examples), number)
        out.append(padded(raw, world.classes))
    return np.stack(out)


def examples(world: World, name: str) -> Rows:
    """The different texts in a task's canonical condition: at most K of each class.

    Of a user's task, whose texts are few, K different ones or all; of the zoo's, whose figures are
    kept, K draws of which some may be the same text.
    """
    config, rows, task = world.config, world.rows[name, "train"], world.task(name)
    pick = draw(config, name, config.examples)
    result = []
    for side in range(task.classes):
        own = rows.index[rows.label == side]
        if len(own) == 0:
            raise StageError(f"task '{name}' has no training text of class {side}")
        if task.level == "user":
            order = np.argsort(draw(config, name, len(own)), kind="stable")
            pick = order[: config.examples]
        result.append(np.unique(own[pick % len(own)]))
    label = np.repeat(np.arange(len(result), dtype=np.int32), [len(own) for own in result])
    return Rows(np.concatenate(result), label)


def of_examples(world: World, name: str) -> World:
    """A world in which a task has no training texts but those of its condition."""
    return world._replace(rows={**world.rows, (name, "train"): examples(world, name)})


def scaling(raw: np.ndarray) -> Scaling:
    """Centring and scale from the seen tasks' raw conditions [n, 2 C, E]."""
    if raw.shape[1] == 2 * FEWEST:  # every task has so many
        mean = raw.mean(0)
        scale = np.sqrt(((raw - mean) ** 2).mean())
    else:
        there = (raw != 0).any(-1, keepdims=True)  # [n, 2 C, 1]
        mean = raw.sum(0) / np.maximum(there.sum(0), 1)
        wide = np.broadcast_to(there, raw.shape)
        scale = np.sqrt(np.square(raw - mean)[wide].mean())
    return Scaling(jnp.asarray(mean, jnp.float32), jnp.asarray(scale, jnp.float32))


def scaled(stats: Scaling, raw: jax.Array) -> jax.Array:
    """Raw conditions [..., 2 C, E] as the generators read them; vectors of zeros stay so."""
    out = (raw - stats.mean.reshape((1,) * (raw.ndim - 2) + stats.mean.shape)) / stats.scale
    if raw.shape[-2] == 2 * FEWEST:
        return out
    return jnp.where(jnp.any(raw != 0, axis=-1, keepdims=True), out, jnp.zeros_like(out))


def random(
    table: Table, embedding: jax.Array, key: jax.Array, task: jax.Array, k: int
) -> jax.Array:
    """[2 C, E] raw condition of one task with K fresh examples and a random wording (traceable)."""
    key_pick, key_word = jax.random.split(key)
    classes = table.counts.shape[1]
    unit = jax.random.uniform(key_pick, (classes, k))
    counts = table.counts[task].astype(jnp.float32)[:, None]
    pick = jnp.minimum((unit * counts).astype(jnp.int32), table.counts[task][:, None] - 1)
    rows = jnp.take_along_axis(table.members[task], pick, axis=1)  # [C, K]
    examples = embedding[rows].mean(1)  # [C, E]
    if classes > FEWEST:
        examples = jnp.where(counts > 0, examples, jnp.zeros_like(examples))
    wording = jax.random.randint(key_word, (classes,), 0, table.words.shape[2])
    words = jnp.take_along_axis(table.words[task], wording[:, None, None], axis=1)[:, 0]
    return jnp.stack([words, examples], 1).reshape(2 * classes, -1)


def random_rows(
    table: Table, key: jax.Array, task: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """(text rows [count], labels [count]) drawn from a task's training texts (traceable)."""
    key_label, key_pick = jax.random.split(key)
    most = table.counts.shape[1]
    own = most if most == FEWEST else jnp.sum(table.counts[task] > 0)
    label = jax.random.randint(key_label, (count,), 0, own)
    size = table.counts[task][label]
    unit = jax.random.uniform(key_pick, (count,))
    pick = jnp.minimum((unit * size.astype(jnp.float32)).astype(jnp.int32), size - 1)
    return table.members[task][label, pick], label

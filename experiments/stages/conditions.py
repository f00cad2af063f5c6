"""Task conditions as arrays: what a generator may know of a task.

A condition is [C = 4, E]: (description, mean of K examples) of class 0, then of class 1, each an
embedding of the frozen base, centred and scaled with statistics of the seen tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages.world import Rows, World, condition, draw
from experiments.workdir import StageError


class Table(NamedTuple):
    """Lookup arrays for conditions and training rows of n tasks."""

    words: jax.Array  # [n, 2, P, E] embeddings of the description and its paraphrases
    members: jax.Array  # [n, 2, M] int32 training rows of each class (repeated to fill M)
    counts: jax.Array  # [n, 2] int32 how many of them are real
    heads: jax.Array  # [n, 2, d] frozen class vectors


class Scaling(NamedTuple):
    """Statistics of the seen tasks' canonical conditions."""

    mean: jax.Array  # [4, E]
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
        for side in (0, 1):
            own = rows.index[rows.label == side]
            if len(own) == 0:
                raise StageError(f"task '{name}' has no training text of class {side}")
            sides.append(np.resize(own, most))
            sizes.append(len(own))
            phrases = (task.class_descriptions[side], *task.paraphrases[side])[:2]
            phrases = phrases if len(phrases) == 2 else phrases * 2
            texts.append(np.stack([world.text[p] for p in phrases]))
        members.append(np.stack(sides))
        counts.append(sizes)
        words.append(np.stack(texts))
        heads.append(world.head_of(name))
    return Table(
        jnp.asarray(np.stack(words)),
        jnp.asarray(np.stack(members), jnp.int32),
        jnp.asarray(np.asarray(counts), jnp.int32),
        jnp.asarray(np.stack(heads)),
    )


def _largest_class(world: World, name: str) -> int:
    return int(np.bincount(world.rows[name, "train"].label, minlength=2).max())


def canonical(world: World, names: Sequence[str], paraphrase: int = 0) -> np.ndarray:
    """[n, 4, E] raw conditions of tasks with their K fixed examples."""
    config = world.config
    out = []
    for name in names:
        task = world.task(name)
        number = min(paraphrase, len(task.paraphrases[0]), len(task.paraphrases[1]))
        if paraphrase and not number:
            raise StageError(f"task '{name}' has no paraphrase of its description")
        out.append(condition(world, task, draw(config, name, config.examples), number))
    return np.stack(out)


def examples(world: World, name: str) -> Rows:
    """The different texts in a task's canonical condition: at most K of each class."""
    config, rows = world.config, world.rows[name, "train"]
    pick = draw(config, name, config.examples)
    found = []
    for side in range(len(world.task(name).class_names)):
        own = rows.index[rows.label == side]
        if len(own) == 0:
            raise StageError(f"task '{name}' has no training text of class {side}")
        found.append(np.unique(own[pick % len(own)]))
    label = np.repeat(np.arange(len(found), dtype=np.int32), [len(own) for own in found])
    return Rows(np.concatenate(found), label)


def scaling(raw: np.ndarray) -> Scaling:
    """Centring and scale from the seen tasks' raw conditions [n, 4, E]."""
    mean = raw.mean(0)
    return Scaling(jnp.asarray(mean), jnp.asarray(np.sqrt(((raw - mean) ** 2).mean()), jnp.float32))


def scaled(stats: Scaling, raw: jax.Array) -> jax.Array:
    """Raw conditions [..., 4, E] as the generators read them."""
    return (raw - stats.mean.reshape((1,) * (raw.ndim - 2) + stats.mean.shape)) / stats.scale


def random(
    table: Table, embedding: jax.Array, key: jax.Array, task: jax.Array, k: int
) -> jax.Array:
    """[4, E] raw condition of one task with K fresh examples and a random wording (traceable)."""
    key_pick, key_word = jax.random.split(key)
    unit = jax.random.uniform(key_pick, (2, k))
    counts = table.counts[task].astype(jnp.float32)[:, None]
    pick = jnp.minimum((unit * counts).astype(jnp.int32), table.counts[task][:, None] - 1)
    rows = jnp.take_along_axis(table.members[task], pick, axis=1)  # [2, K]
    examples = embedding[rows].mean(1)  # [2, E]
    wording = jax.random.randint(key_word, (2,), 0, table.words.shape[2])
    words = jnp.take_along_axis(table.words[task], wording[:, None, None], axis=1)[:, 0]
    return jnp.stack([words, examples], 1).reshape(4, -1)


def random_rows(
    table: Table, key: jax.Array, task: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """(text rows [count], labels [count]) drawn from a task's training texts (traceable)."""
    key_label, key_pick = jax.random.split(key)
    label = jax.random.randint(key_label, (count,), 0, 2)
    size = table.counts[task][label]
    unit = jax.random.uniform(key_pick, (count,))
    pick = jnp.minimum((unit * size.astype(jnp.float32)).astype(jnp.int32), size - 1)
    return table.members[task][label, pick], label

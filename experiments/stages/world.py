"""Stage `data`: the fixed world of an experiment (frozen base, texts, tasks, conditions, head).

Only the upper `layers` of the encoder carry adapters, so the states entering them are the same in
every run: they are computed once per text and kept on disk.

Symbols: N texts, t tokens kept, d width, E = d condition width, C classes of the task that has
most. A condition is 2 C vectors: description and mean example of each class. What a task of fewer
classes does not have is zero: class vectors of the head, and vectors of a condition.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.data import glue, user
from experiments.data import tasks as task_lib
from experiments.data.task import FEWEST, MOST
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import base_model
from experiments.workdir import StageError, save_array, write_json
from jlora.models import encoder

PyTree = Any
SPLITS = ("train", "validation", "test")
ARRAYS = ("hidden", "mask", "embedding")  # what the base says of each text, a file each
BATCH = 64  # texts per call of the base
BLOCK = 4 * BATCH  # texts per piece of work


class Rows(NamedTuple):
    """One split of one task as rows of the text table."""

    index: np.ndarray  # int32 [n], row of the text
    label: np.ndarray  # int32 [n], 0 to C - 1


class World(NamedTuple):
    """Everything that no stage changes."""

    config: Config  # settings
    model: encoder.EncoderConfig  # shape of the base encoder
    upper: PyTree  # parameters of the adapted layers: {'layers': ...}
    below: int  # frozen layers below them
    hidden: jax.Array  # [N, t, d] f32, states entering the adapted layers
    mask: jax.Array  # [N, t] bool, real tokens
    embedding: np.ndarray  # [N, d] f32, unit norm, what the unadapted base says of each text
    tasks: tuple[task_lib.Task, ...]  # zoo and held-out tasks, seen ones first
    pool: tuple[task_lib.Task, ...]  # every allowed ordered pair of seen labels
    rows: dict[tuple[str, str], Rows]  # (task name, split) -> rows
    heads: np.ndarray  # [tasks + pool, C, d] f32, frozen class vectors
    text: dict[str, np.ndarray]  # description -> [d] base embedding

    @property
    def classes(self) -> int:
        """C, classes of the task that has most."""
        return self.heads.shape[1]

    def names(self, level: str) -> list[str]:
        """Names of the tasks of one level, in order."""
        return [t.name for t in self.tasks if t.level == level]

    def task(self, name: str) -> task_lib.Task:
        """The task of that name. Raises StageError for an unknown one."""
        for task in (*self.tasks, *self.pool):
            if task.name == name:
                return task
        raise StageError(f"no task named '{name}': known are {sorted(t.name for t in self.tasks)}")

    def head_of(self, name: str) -> np.ndarray:
        """[C, d] class vectors of a task."""
        order = {t.name: i for i, t in reversed(list(enumerate((*self.tasks, *self.pool))))}
        return self.heads[order[name]]


def classifier(model: encoder.EncoderConfig, scale: float) -> Callable[..., jax.Array]:
    """The task model: `apply(upper, hidden [b,t,d], mask [b,t], head [b,C,d]) -> logits [b,C]`.

    The logit of a class that a task does not have, whose vector is zero, is minus infinity.
    """

    def apply(upper: PyTree, hidden: jax.Array, mask: jax.Array, head: jax.Array) -> jax.Array:
        out = encoder.mean_pool(encoder.run(upper, hidden, mask, model), mask)
        logits = jnp.float32(scale) * jnp.einsum("bd,bcd->bc", out, head)
        return existing(logits, head)

    return apply


def existing(logits: jax.Array, head: jax.Array) -> jax.Array:
    """Logits [..., C], minus infinity where a class vector of the head [..., C, d] is zero."""
    if head.shape[-2] == FEWEST:  # every task has so many
        return logits
    return jnp.where(jnp.any(head != 0, axis=-1), logits, -jnp.inf)


def condition(
    world: World,
    task: task_lib.Task,
    pick: np.ndarray | Sequence[int] | None,
    paraphrase: int = 0,
) -> np.ndarray:
    """[2 C, E] condition of a task: (description, mean example) of class 0, of class 1, ...

    Args:
      pick: K positions used for each class, taken modulo the class's number of training texts;
        None: all of them once. paraphrase: 0 is the description itself, p > 0 its p-th paraphrase.

    Returns:
      C is that of this task; `padded` fills it up to another's.
    """
    rows = world.rows[task.name, "train"]
    parts = []
    for side in range(task.classes):
        words = task.class_descriptions[side]
        if paraphrase:
            words = task.paraphrases[side][paraphrase - 1]
        own = rows.index[rows.label == side]
        own = own if pick is None else own[np.asarray(pick) % len(own)]
        examples = world.embedding[own]
        parts += [world.text[words], examples.mean(0)]
    return np.stack(parts).astype(np.float32)


def padded(raw: np.ndarray, classes: int) -> np.ndarray:
    """A condition [..., n, E] filled up with zeros to `classes` classes [..., 2 classes, E]."""
    missing = 2 * classes - raw.shape[-2]
    if not missing:
        return raw
    return np.pad(raw, [(0, 0)] * (raw.ndim - 2) + [(0, missing), (0, 0)])


def draw(config: Config, salt: str, k: int, n: int = 1 << 20) -> np.ndarray:
    """K deterministic pseudo-random positions for a name."""
    seed = [config.data_seed, *salt.encode()]
    return np.random.default_rng(seed).integers(0, n, size=k)


class Texts(NamedTuple):
    """The texts of all tasks, before the base has seen them."""

    base: base_model.Base  # the frozen encoder
    tasks: tuple[task_lib.Task, ...]  # zoo and held-out tasks
    pool: tuple[task_lib.Task, ...]  # of the task loss
    texts: list[str]  # N different ones
    rows: dict[tuple[str, str], Rows]  # (task name, split) -> rows
    digest: str  # sha256 of the texts


def prepare(context: Context) -> Texts:
    """Load the base and gather every task's texts."""
    config = context.config
    chosen, pool = choose(config)
    texts: dict[str, int] = {}
    rows: dict[tuple[str, str], Rows] = {}
    for task in (*chosen, *pool):
        caps = task_lib.Caps(config.train_texts, 40, max(1, config.eval_rows // task.classes))
        corpus = task_lib.data(task, context.cache, caps)
        for split in SPLITS:
            words, labels = getattr(corpus, split)
            index = [texts.setdefault(w, len(texts)) for w in words]
            rows[task.name, split] = Rows(np.asarray(index, np.int32), np.asarray(labels, np.int32))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    base = base_model.load(config, context.cache)
    return Texts(base, chosen, pool, list(texts), rows, digest)


def pieces(context: Context, prepared: Texts) -> list[Piece]:
    """The frozen lower layers over every text, a block of texts per piece."""
    return [
        Piece(f"states_{k:04d}.npz", len(part), functools.partial(_states, context, prepared, k))
        for k, part in enumerate(_blocks(prepared.texts, BLOCK))
    ]


def _blocks(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _states(context: Context, prepared: Texts, k: int, folder: Path, bar: Progress) -> None:
    block = prepared.texts[k * BLOCK : (k + 1) * BLOCK]
    out = []
    for part in _blocks(block, BATCH):
        out.append(base_model.states(prepared.base, part, context.config, BATCH))
        bar.step(len(part))
    named = dict(zip(ARRAYS, map(np.concatenate, zip(*out, strict=True)), strict=True))
    save_array(folder / f"states_{k:04d}.npz", **named)


def finish(context: Context, prepared: Texts, folder: Path) -> dict[str, Any]:
    """The blocks as one array each of hidden, mask and embedding."""
    if context.processes.first:
        files = sorted(folder.glob("states_*.npz"))
        for name in ARRAYS:
            parts = []
            for file in files:
                with np.load(file) as block:
                    parts.append(block[name])
            np.save(folder / f"{name}.npy", np.concatenate(parts))
        for file in files:
            file.unlink()
        write_json(folder / "settings.json", dataclasses.asdict(context.config))
    return {"texts": len(prepared.texts), "content": prepared.digest}


def read(context: Context, prepared: Texts, done: Done) -> World:
    """The world, its base states from disk."""
    config, base = context.config, prepared.base
    if done.info.get("content") != prepared.digest:
        raise StageError(
            f"{done.path}: was computed from other texts than the tasks have now; use another"
            " --workdir or delete this one"
        )
    hidden, mask, embedding = (np.load(done.path / f"{name}.npy") for name in ARRAYS)
    every = (*prepared.tasks, *prepared.pool)
    text = phrases(base, every, config.max_length)
    return World(
        config=config,
        model=base.config,
        upper=base_model.upper(base, config),
        below=base_model.lower_count(base, config),
        hidden=jnp.asarray(hidden),
        mask=jnp.asarray(mask),
        embedding=embedding,
        tasks=prepared.tasks,
        pool=prepared.pool,
        rows=prepared.rows,
        heads=make_heads(config, every, text, base.config.width),
        text=text,
    )


def phrases(
    base: base_model.Base, tasks: Sequence[task_lib.Task], length: int
) -> dict[str, np.ndarray]:
    """Base embedding [d] of every description, paraphrase and class name of the tasks."""
    words = sorted(
        {w for t in tasks for w in (*t.class_descriptions, *t.class_names)}
        | {w for t in tasks for side in t.paraphrases for w in side}
    )
    return dict(zip(words, base_model.embed_texts(base, words, length), strict=True))


def build(config: Config, workdir: Path, cache: Path | None) -> World:
    """The world alone, computing the base's states on the first call."""
    return STAGE.run(Context(config, workdir, cache))


def choose(config: Config) -> tuple[tuple[task_lib.Task, ...], tuple[task_lib.Task, ...]]:
    """(zoo and held-out tasks, pool of the task loss) named by `--tasks` and `--task_dir`."""
    kind, _, where = config.tasks.partition(":")
    if kind == "glue":
        chosen, pool = glue.tasks(where), []
    else:
        preset = task_lib.config(kind, seed=config.data_seed)
        chosen, pool = task_lib.build(preset), task_lib.seen_pairs_pool(preset)
    if config.task_dir:
        chosen = [*chosen, *user.tasks(config.task_dir)]
    order = ("seen", "user", "unseen_pair", "unseen_label", "unseen_corpus", "unseen_kind")
    chosen.sort(key=lambda t: order.index(t.level))  # stable: the plan's order within a level
    known = {t.name for t in chosen}
    return tuple(chosen), tuple(t for t in pool if t.name not in known)


def make_heads(
    config: Config, tasks: Sequence[task_lib.Task], text: dict[str, np.ndarray], width: int
) -> np.ndarray:
    """[n, C, d] frozen class vectors: random orthonormal ones, class c's of every task the same,
    or label texts; zero for the classes that a task does not have."""
    out = np.zeros((len(tasks), max(t.classes for t in tasks), width), np.float32)
    vectors = _orthonormal(config.data_seed, out.shape[1], width)
    for head, task in zip(out, tasks, strict=True):
        if config.head == "anonymous":
            head[: task.classes] = vectors[: task.classes]
        else:
            head[: task.classes] = [text[words] for words in task.class_descriptions]
    return out


def _orthonormal(seed: int, count: int, width: int) -> np.ndarray:
    """[count, width]: the first are the same whatever the count."""
    if count > width:
        raise StageError(
            f"got a task of {count} classes, expected at most the base's width {width}"
        )
    noise = np.random.default_rng([seed, 7]).normal(size=(width, FEWEST))
    pair = np.linalg.qr(noise)[0]
    if count == FEWEST:
        return pair.T.astype(np.float32)
    # Columns of Q span those of the input in turn, so that the rest is orthogonal to the pair.
    more = np.random.default_rng([seed, 8]).normal(size=(width, MOST - FEWEST))
    q = np.linalg.qr(np.concatenate([pair, more[:, : count - FEWEST]], axis=1))[0]
    return np.concatenate([pair, q[:, FEWEST:]], axis=1).T.astype(np.float32)


def describe(world: World) -> str:
    """The world in one line."""
    count = {
        level: len(world.names(level)) for level in dict.fromkeys(t.level for t in world.tasks)
    }
    levels = ", ".join(f"{n} {level}" for level, n in count.items())
    depth = jax.tree.leaves(world.upper)[0].shape[0]
    return (
        f"{len(world.hidden)} texts of {len(world.tasks)} tasks ({levels}); adapters on the last"
        f" {depth} of {world.model.layers} layers"
    )


STAGE = Stage(
    name="data",
    inputs=(),
    unit="text",
    prepare=prepare,
    pieces=pieces,
    finish=finish,
    read=read,
    describe=describe,
)

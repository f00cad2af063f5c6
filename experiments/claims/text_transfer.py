r"""What the claims of Trans-LoRA share: adapters of four text tasks move from base to base.

==========  ==================================================================================
t           task: 4 corpora on which probes of frozen features get 0.65 to 0.83
A_t         LoRA of the source's last two layers, trained on all training rows of t
phi_t       discriminator of training rows and written texts, trained at the same time
Handed      what its owner hands on: A_t, phi_t, the names of the classes and five rows
==========  ==================================================================================

`owned` has the training rows; `moved` gets `Handed` and texts, nothing else, and reads texts by
`Handed.read`, which notes them. After it, `checked` compares what was read with all training rows:
one that is not among the five, nor was written by chance, is an error.

Texts are written once by SmolLM2 (`transfer_texts`). Per seed they are split anew: some train the
discriminator, of the others it keeps half. Filtered, unfiltered (as many, by chance) and random
texts (words by chance) get the same steps. Nothing was tuned on the target: rate and steps of the
students are those of the source.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_methods, transfer_texts
from experiments.claims import transfer_bases as bases
from experiments.claims.transfer_bases import CONFIG, Read, inputs, lora
from experiments.data import tasks as task_lib
from experiments.data.task import Caps, Task
from jlora.transfer import Model, Texts, trans_lora
from jlora.transfer.discriminator import Discriminator, fit, log_odds
from jlora.transfer.distill import distill
from jlora.types import Dynamic

ASSETS = (*text_methods.ASSETS, "minilm_l3", "smollm2")
RATE = 5e-3  # of every training, at its start


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    written: int = 160  # texts of a task
    judged: int = 48  # of them, for the discriminator
    keep: int = 64  # of the others
    source_steps: int = 240
    steps: int = 160  # of a student
    test: int = 320  # rows of a task


@dataclasses.dataclass(frozen=True)
class Handed:
    """All that leaves the owner of the training rows."""

    base: str  # that the adapters are of
    tasks: tuple[Task, ...]  # names and descriptions of classes, no texts
    seeds: tuple[tuple[str, ...], ...]  # five texts of each task
    labels: tuple[tuple[int, ...], ...]  # of the seeds
    adapters: jl.Adapter  # trained arrays [T, ...]
    discriminators: Discriminator  # arrays [T, ...]
    opened: list[str] = dataclasses.field(default_factory=list)  # texts that were read since

    def __post_init__(self):
        for task, seeds in zip(self.tasks, self.seeds, strict=True):
            if len(seeds) != transfer_texts.SEEDS:
                raise ValueError(f"{task.name}: got {len(seeds)} rows, expected "
                                 f"{transfer_texts.SEEDS}")  # fmt: skip

    def read(self, at: bases.Side, texts: Sequence[Sequence[str]]) -> Read:
        """`bases.read`, and every text is noted: all reading after the hand-over is done here."""
        self.opened.extend(t for own in texts for t in own)
        return bases.read(at, texts)


# --- the owner of the training rows ------------------------------------------------------------


@functools.cache
def rows(name: str) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """Texts and labels of each task: "train", "test"."""
    caps = Caps(CONFIG.train_texts, 40, CONFIG.eval_rows // 2)
    every = [getattr(task_lib.data(t, None, caps), name) for t in bases.tasks()]
    return tuple((tuple(texts), tuple(labels.tolist())) for texts, labels in every)


def seeds_of(split: tuple[tuple[str, ...], tuple[int, ...]]) -> tuple[tuple, tuple]:
    """The first five rows, whose classes take turns: texts and labels."""
    return tuple(x[: transfer_texts.SEEDS] for x in split)  # type: ignore[return-value]


@functools.cache
def texts_of(size: int, workdir: Path) -> tuple[transfer_texts.Written, ...]:
    """What SmolLM2 wrote for each task, after its five rows."""
    return tuple(
        transfer_texts.written(task.name, seeds_of(split)[0], size, workdir)
        for task, split in zip(bases.tasks(), rows("train"), strict=True)
    )


@functools.cache
def training_states(base: str, workdir: Path) -> tuple[Read, jax.Array]:
    """The training rows as a base reads them, and their labels [T, n]."""
    most = 2 * CONFIG.train_texts
    train = [(np.resize(np.asarray(x, object), most), np.resize(y, most)) for x, y in rows("train")]
    states = bases.read(bases.side(base, workdir), [x.tolist() for x, _ in train])
    return states, jnp.asarray(np.stack([y for _, y in train]), jnp.int32)


def owned(size: Size, seed: int, workdir: Path, base: str) -> Handed:
    """Trains adapters and discriminators on all training rows; hands on five of each task."""
    at = bases.side(base, workdir)
    states, label = training_states(base, workdir)
    start = bases.fresh(at, lora(), seed)
    targets = jax.nn.one_hot(label, at.heads.shape[1])
    trained = _distilled(
        at.apply, start.sites, size.source_steps, at.params, start,
        inputs(at, states), targets, jax.random.split(jax.random.key(seed), len(bases.tasks())),
    )  # fmt: skip
    judged = bases.read(at, [part[0] for part in parts(size, seed, workdir)])
    found = jax.jit(jax.vmap(fit))(states.embedding, judged.embedding)
    handed = [seeds_of(split) for split in rows("train")]
    texts, labels = zip(*handed, strict=True)
    return Handed(base, bases.tasks(), texts, labels, trained, found)


def parts(size: Size, seed: int, workdir: Path) -> list[tuple[list[str], list[str]]]:
    """Per task, texts for the discriminator and texts to learn from, split anew by each seed."""
    out = []
    for number, own in enumerate(texts_of(size.written, workdir)):
        order = np.random.default_rng([seed, number]).permutation(size.written)
        mixed = [own.texts[i] for i in order]
        out.append((mixed[: size.judged], mixed[size.judged :]))
    return out


def checked(handed: Handed, written: Sequence[transfer_texts.Written]) -> int:
    """How many written texts are training rows word for word, by chance.

    Raises:
      ValueError: a training row was read that was neither handed on nor written.
    """
    seeds = {text for own in handed.seeds for text in own}
    known = {text for texts, _ in rows("train") for text in texts} - seeds
    same = known & {text for own in written for text in own.texts}
    if leaked := (known - same) & set(handed.opened):
        raise ValueError(f"opened: got {len(leaked)} training rows, as {min(leaked)!r}, expected "
                         "the rows that were handed on alone")  # fmt: skip
    return len(same)


# --- who gets the adapters ----------------------------------------------------------------------


class Moved(NamedTuple):
    """A student of each task."""

    adapter: jl.Adapter  # trained arrays [T, ...]
    odds: jax.Array  # [T, N], log-odds of the texts
    kept: jax.Array  # [T, K]


def moved(
    handed: Handed, texts: Sequence[Sequence[str]], size: Size, seed: int, workdir: Path,
    *, base: str, method: Dynamic, filtered: bool = True,
) -> Moved:  # fmt: skip
    """The adapters on another base, from texts alone.

    Args:
      handed: what their owner handed on.
      texts: of each task.
      size: steps, and how many are kept.
      seed: of start and batches.
      workdir: where the bases are.
      base: the target.
      method: of the target.
      filtered: False: the first `keep` texts, whatever the discriminator says.
    """
    source, target = bases.side(handed.base, workdir), bases.side(base, workdir)
    texts = texts if filtered else [own[: size.keep] for own in texts]
    seen, own = handed.read(source, texts), handed.read(target, texts)
    start = bases.fresh(target, method, seed)
    keys = jax.random.split(jax.random.key(seed), len(texts))
    return _moved(
        source.apply, target.apply, size, (source.params, handed.adapters),
        (target.params, start), handed.discriminators,
        Texts(seen.embedding, inputs(source, seen), inputs(target, own)), keys,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moved(source_apply, target_apply, size, source, target, discriminators, texts, keys):
    (base, adapters), (params, start) = source, target

    def one(key, trainable, discriminator, texts):
        given = Model(source_apply, base, adapters.replace(trainable=trainable))
        done = trans_lora(
            key, given, Model(target_apply, params, start), discriminator, texts,
            keep=size.keep, steps=size.steps, solver=solver(size.steps),
        )  # fmt: skip
        return done.adapter.trainable, done.odds, done.kept

    mapped = jax.vmap(one)(keys, adapters.trainable, discriminators, texts)
    return Moved(start.replace(trainable=mapped[0]), *mapped[1:])


def solver(steps: int) -> optax.GradientTransformation:
    """Of all trainings: the paper's schedule."""
    return optax.adam(optax.linear_schedule(RATE, 0.0, steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _distilled(apply, sites, steps, params, start, rows, targets, keys):
    del sites  # of the start: part of what is compiled

    def one(key, rows, targets):
        return distill(key, apply, params, start, rows, targets, solver=solver(steps), steps=steps,
                       batch=text_methods.BATCH).adapter.trainable  # fmt: skip

    return start.replace(trainable=jax.vmap(one)(keys, rows, targets))


def from_seeds(handed: Handed, size: Size, seed: int, workdir: Path, base: str) -> jl.Adapter:
    """LoRA of the target trained on the five rows alone."""
    at = bases.side(base, workdir)
    targets = jax.nn.one_hot(jnp.asarray(handed.labels, jnp.int32), at.heads.shape[1])
    start, keys = (
        bases.fresh(at, lora(), seed),
        jax.random.split(jax.random.key(seed), len(handed.tasks)),
    )
    given = inputs(at, handed.read(at, handed.seeds)), targets, keys
    return _distilled(at.apply, start.sites, size.steps, at.params, start, *given)


# --- on test rows -------------------------------------------------------------------------------


@functools.cache
def test(base: str, count: int, workdir: Path) -> tuple[Read, jax.Array]:
    """Test rows of all tasks as a base reads them, and their labels [T, n]."""
    texts = [list(x[:count]) for x, _ in rows("test")]
    label = [y[:count] for _, y in rows("test")]
    return bases.read(bases.side(base, workdir), texts), jnp.asarray(label, jnp.int32)


def accuracy(base: str, adapter: jl.Adapter, size: Size, workdir: Path) -> tuple[float, ...]:
    """Test accuracy per task of a base with one adapter per task."""
    at, (states, label) = bases.side(base, workdir), test(base, size.test, workdir)
    hits = _hits(at.apply, at.params, adapter, inputs(at, states), label)
    return tuple(np.asarray(hits, np.float64).mean(1).tolist())


@functools.partial(jax.jit, static_argnums=0)
def _hits(apply, params, adapter, rows, label):
    model = jl.lift(apply)

    def one(given):
        trainable, rows, label = given
        logits = model(params, adapter.replace(trainable=trainable), *rows)
        return logits.argmax(-1).astype(jnp.int32) == label

    return jax.lax.map(one, (adapter.trainable, rows, label))


def linear(handed: Handed, size: Size, workdir: Path, base: str) -> tuple[float, ...]:
    """Test accuracy of logistic regression on the frozen target, trained on the five rows."""
    at, (states, label) = bases.side(base, workdir), test(base, size.test, workdir)
    seeds = np.asarray(handed.read(at, handed.seeds).embedding)
    out = []
    for task, own in enumerate(handed.labels):
        second = np.asarray(own, bool)
        head = _fit(jnp.asarray(seeds[task][second]), jnp.asarray(seeds[task][~second]))
        guess = (log_odds(head, states.embedding[task]) > 0).astype(jnp.int32)
        out.append(float((guess == label[task]).mean()))
    return tuple(out)


_fit = jax.jit(fit)

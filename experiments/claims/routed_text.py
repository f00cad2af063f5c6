r"""What the claims of routed adapters share: one adapter for mixed tasks without their names.

==========  ==============================================================================
T           the eight text tasks of the merging claims; batches are drawn from all of them
e           experts; with `zoo` the trained adapters of the tasks, frozen
f           load of an expert, from the reports of a site
==========  ==============================================================================

Every row of a batch is of any task. The class vectors of its task are given, as they are what the
labels mean; which adapter to use is not. Trained is one adapter of the attention kernels of two
layers of MiniLM, by Adam with a cosine decay, on

.. math:: L = \mathrm{CE} + \lambda \textstyle\sum_{sites} L_{balance}
              + \eta \sum_{sites} H + \mu \sum_{sites} L_{label}

where H is the entropy of a router, with :math:`\eta` of either sign, and :math:`\mu > 0` only for
methods whose gates are taught which task a token is of, in training.
Balance states advance after every step. The rate is the best of three or more on validation rows,
with a seed of its own; every seed is judged on the test rows of each task. Baselines:

- a recipe: LoRA of about as many trained numbers, or another router, with a rate of its own;
- ``single``: the task's adapter that is best on the validation rows of all tasks;
- ``merge``: the best of `MERGES` with the best factor, on the same rows.

The control is the trained adapter with its router shuffled: what decides for an expert decides for
the next one, in every site and layer (of methods without a router: each rank has the output of the
next one). It knows no less and uses it in the wrong place, so it has to be worse.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_merges
from experiments.claims.protocol import Claim, Figures
from experiments.claims.routed_mix import Mix, experts, mix
from experiments.merging import cells
from jlora.methods.routed.expert_bank import with_experts
from jlora.methods.routed.lora_mixer import in_regime
from jlora.routing.state import advance

SITES = tuple(f"layers/attention/{s}/kernel" for s in ("query", "key", "value", "out"))
STEPS, BATCH = 80, 16
FACTOR, EXTENSIONS, TUNING = 3.0, 2, 1000  # of the grid; the seed that the rate is chosen with
ROWS = 32  # rows that are judged at once
MERGES = ("task_arithmetic", "ties", "tsv")

Static = Literal["single", "merge"]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What is trained, and how. Two recipes are equal when they are one object."""

    name: str  # in the record
    method: Any  # of the four attention kernels
    rate: float = 5e-3  # the middle of the first three learning rates
    balance: float = 0.0  # lambda
    labels: float = 0.0  # mu
    entropy: float = 0.0  # eta, below 0: a router that spreads
    zoo: bool = False  # experts are the trained adapters of the tasks
    states: bool = False  # a first pass gives ctx["hidden"]
    regime: Any = None  # of LoRA-Mixer: the one that is judged
    steps: int = STEPS


@functools.cache
def lora(rank: int) -> Recipe:
    """The baseline: one LoRA at scale 1 for all tasks."""
    return Recipe(f"LoRA of rank {rank}", jl.LoRA(rank=rank, alpha=float(rank)), 8e-3)


def fresh(found: Mix, recipe: Recipe, seed: int, workdir: Path) -> jl.Adapter:
    """The adapter of a recipe before training."""
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    methods = dict.fromkeys(SITES, recipe.method)
    made = jl.init(jax.random.key(seed), found.apply, found.base, *example, methods=methods)
    return with_experts(made, experts(found, seed, workdir)) if recipe.zoo else made


def train(
    found: Mix, recipe: Recipe, adapter: jl.Adapter, rate: float, seed: int
) -> tuple[jl.Adapter, np.ndarray]:
    """One adapter trained on batches of all tasks; and the cross entropy of every step."""
    weights = (
        ("balance", recipe.balance),
        ("label_loss", recipe.labels),
        ("entropy", recipe.entropy),
    )
    how = weights, recipe.states, recipe.steps
    static = found.apply, found.states, adapter.sites, how
    data = found._replace(apply=None, states=None, names=())  # type: ignore[arg-type]
    key = jax.random.key(seed)
    one, frozen, losses = _train(*static, data, adapter.trainable, adapter.frozen,
                                 jnp.float32(rate), key)  # fmt: skip
    return adapter.replace(trainable=one, frozen=frozen), np.asarray(losses, np.float64)


def _context(states, base, inputs, task):
    """What the lifted model is given besides a batch; the task in training only."""
    mask = inputs[1]
    ctx = {"mask": mask}
    if states is not None:
        ctx["hidden"] = jax.lax.stop_gradient(states(base, *inputs))
    if task is not None:
        ctx["labels"] = jnp.broadcast_to(task[:, None], mask.shape)
    return ctx


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(apply, states, sites, how, found, start, frozen, rate, key):
    model, (weights, two_pass, steps) = jl.lift(apply, aux=True), how
    solver = optax.adam(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / steps)))

    def total(aux, name):
        parts = [jnp.sum(r[name]) for r in aux.values() if name in r]
        return functools.reduce(jnp.add, parts, jnp.zeros((), jnp.float32))

    def loss(one, frozen, task, index, label):
        inputs = found.hidden[index], found.mask[index], found.heads[task]
        ctx = _context(states if two_pass else None, found.base, inputs, task)
        logits, aux = model(found.base, jl.Adapter(one, frozen, sites), *inputs, ctx=ctx)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return value + sum(w * total(aux, name) for name, w in weights if w), (value, aux)

    def step(carry, number):
        one, frozen, state = carry
        of_task, of_row = jax.random.split(jax.random.fold_in(key, number))
        task = jax.random.randint(of_task, (BATCH,), 0, found.index.shape[0])
        row = jax.random.randint(of_row, (BATCH,), 0, found.index.shape[1])
        rows = task, found.index[task, row], found.label[task, row]
        grads, (value, aux) = jax.grad(loss, has_aux=True)(one, frozen, *rows)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = solver.update(grads, state, one)
        frozen = advance(jl.Adapter(one, frozen, sites), aux).frozen
        return (optax.apply_updates(one, updates), frozen, state), value

    with jax.numpy_dtype_promotion("standard"):
        state = solver.init(start)
    numbers = jnp.arange(steps, dtype=jnp.int32)
    (one, frozen, _), losses = jax.lax.scan(step, (start, frozen, state), numbers)
    return one, frozen, losses


def judge(
    found: Mix, recipe: Recipe, adapter: jl.Adapter, rows: tuple[jax.Array, jax.Array]
) -> np.ndarray:
    """Accuracy per task of one adapter that is given no task: [T]."""
    adapter = in_regime(adapter, recipe.regime) if recipe.regime else adapter
    states = found.states if recipe.states else None
    data = found._replace(apply=None, states=None, names=())  # type: ignore[arg-type]
    out = []
    for task in range(len(found.names)):
        index, label = (x[task].reshape(-1, ROWS) for x in rows)
        hits = [
            _hits(found.apply, states, adapter.sites, data, adapter.trainable, adapter.frozen,
                  jnp.int32(task), i, y)
            for i, y in zip(index, label, strict=True)
        ]  # fmt: skip
        out.append(float(np.mean(hits)))
    return np.asarray(out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _hits(apply, states, sites, found, trainable, frozen, task, index, label):
    heads = jnp.broadcast_to(found.heads[task], (index.shape[0], *found.heads.shape[1:]))
    inputs = found.hidden[index], found.mask[index], heads
    ctx = _context(states, found.base, inputs, None)
    logits = jl.lift(apply)(found.base, jl.Adapter(trainable, frozen, sites), *inputs, ctx=ctx)
    return logits.argmax(-1).astype(jnp.int32) == label


def shuffled(adapter: jl.Adapter) -> jl.Adapter:
    """The control: what decides for one expert decides for the next."""
    routers = {"router", "gate", "head", "head_bias"}
    trainable, frozen = {}, dict(adapter.frozen)
    for path, arrays in adapter.trainable.items():
        turned = {k: jnp.roll(t, 1, axis=-1) for k, t in arrays.items() if k in routers}
        if not turned and "b" in arrays and "bias" in frozen.get(path, {}):
            turned = {"b": jnp.roll(arrays["b"], 1, axis=-2)}  # ranks that choose themselves
        elif "bias" in frozen.get(path, {}):  # the state belongs to the router
            frozen[path] = {**frozen[path], "bias": jnp.roll(frozen[path]["bias"], 1, axis=-1)}
        trainable[path] = {**arrays, **turned}
    return adapter.replace(trainable=trainable, frozen=frozen)


class Tuned(NamedTuple):
    """The learning rate of a recipe."""

    rate: float  # the best one
    edge: bool  # whether it is the smallest or the largest that was tried


@functools.cache
def tune(recipe: Recipe, workdir: Path) -> Tuned:
    """The best of three learning rates or more, by accuracy on validation rows."""
    found, score = mix(workdir), {}
    adapter = fresh(found, recipe, TUNING, workdir)
    todo = [recipe.rate / FACTOR, recipe.rate, recipe.rate * FACTOR]
    for _ in range(EXTENSIONS + 1):
        for rate in todo:
            made, losses = train(found, recipe, adapter, rate, TUNING)
            value = judge(found, recipe, made, found.validation).mean()
            score[rate] = float(value) if np.isfinite(losses).all() else -np.inf
        top, low, high = max(score, key=score.__getitem__), min(score), max(score)
        if low < top < high:
            break
        todo = [top * FACTOR if top == high else top / FACTOR]
    return Tuned(top, top in (low, high))


class Result(NamedTuple):
    """A recipe at its learning rate, one seed."""

    accuracy: tuple[float, ...]  # per task, on test rows
    control: tuple[float, ...]  # of the same adapter with its router shuffled
    size: int  # trained numbers
    rate: float
    edge: bool  # of the grid of rates


@functools.cache
def run(recipe: Recipe, seed: int, workdir: Path) -> Result:
    """A recipe at its own best rate, trained and judged on test rows."""
    found, best = mix(workdir), tune(recipe, workdir)
    made, _ = train(found, recipe, fresh(found, recipe, seed, workdir), best.rate, seed)
    accuracy, control = (
        tuple(judge(found, recipe, a, found.test).tolist()) for a in (made, shuffled(made))
    )
    size = sum(t.size for t in jax.tree.leaves(made.trainable))
    return Result(accuracy, control, size, best.rate, best.edge)


@functools.cache
def static(kind: Static, seed: int, workdir: Path) -> tuple[str, tuple[float, ...]]:
    """The best adapter without a router, chosen on validation rows: its name, accuracy per task."""
    found = mix(workdir)
    adapters = experts(found, seed, workdir)
    if kind == "single":
        tried = {name: (a, 1.0) for name, a in zip(found.names, adapters, strict=True)}
    else:
        made = {m: text_merges.merged(text_merges.Side(m), adapters, seed) for m in MERGES}
        tried = {f"{m} x {c:.2g}": (a, c) for m, a in made.items()
                 for c in cells.factors(len(adapters), m, text_merges.PLAN.powers)}  # fmt: skip

    def accuracy(at: tuple[jl.Adapter, float], split: str) -> list[float]:
        scores = text_merges.accuracies(workdir, *at, found.names, split)
        return [scores[name] for name in found.names]

    best = max(tried, key=lambda name: np.mean(accuracy(tried[name], "validation")))
    return best, tuple(accuracy(tried[best], "test"))


def figures(
    recipe: Recipe, baseline: Recipe | Static, others: tuple[Recipe, ...], seed: int, workdir: Path
) -> Figures:
    """The figures per task of a router, its baseline and its control, one seed."""
    recipes = (recipe, *others, *(() if isinstance(baseline, str) else (baseline,)))
    found, more = {r: run(r, seed, workdir) for r in recipes}, {}
    for r, made in found.items():
        more |= {f"{r.name}: accuracy": float(np.mean(made.accuracy)),
                 f"{r.name}: trained numbers": made.size, f"{r.name}: rate": made.rate,
                 f"{r.name}: rate at an end of the grid": float(made.edge)}  # fmt: skip
    if isinstance(baseline, str):
        name, values = static(baseline, seed, workdir)
        more[f"{baseline}: {name}"] = float(np.mean(values))
    else:
        values = found[baseline].accuracy
    ours = found[recipe]
    return Figures(mix(workdir).names, ours.accuracy, values, ours.control, more=more)


def claim(
    name: str, systems: tuple[str, ...], recipe: Recipe, baseline: Recipe | Static, reference: str,
    *, margin: float = 0.0, parameters: str = "", others: tuple[Recipe, ...] = (),
) -> Claim:  # fmt: skip
    """The claim that a routed adapter is better on the mixture than a baseline.

    Args:
      name: of the claim file.
      systems: names in the registry.
      recipe: of the system.
      baseline: another recipe, the best single adapter or the best static merge.
      reference: where the paper says so.
      margin: by how much it must be better; negative: at most so much worse.
      parameters: "at equal parameter count", ...
      others: recipes whose figures are recorded too.
    """
    said = {"single": "the best single adapter", "merge": "the best static merge"}
    other = said[baseline] if isinstance(baseline, str) else baseline.name
    more = f" {'-' if margin < 0 else '+'} {abs(100 * margin):g} points" if margin else ""
    return Claim(
        name=name,
        systems=systems,
        statement=f"test accuracy on {text_merges.SIZE} tasks without a task's name: "
        f"{recipe.name} > {other}{more}" + (f", {parameters}" if parameters else ""),
        reference=reference,
        baseline=other,
        control="the trained adapter with its router shuffled",
        unit="accuracy",
        assets=text_merges.ASSETS,
        run=functools.partial(figures, recipe, baseline, others),
        margin=margin,
    )

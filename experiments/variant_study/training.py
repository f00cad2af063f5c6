r"""Trains and judges lanes: one adapter per pair of a learning rate and a task, all at once.

==========  ==============================================================================
l           lane: a rate and a task; a leading axis of trained arrays
q           state of the schedule of a lane
g           gradient of the adapter that the schedule shows at this step
==========  ==============================================================================

Adam, or the solver of the variant, with a cosine decay to zero over n = 1..N steps:

.. math:: g = \nabla_\theta \, L(\mathrm{view}(\theta, q, n)), \qquad
          \theta' = \theta + \mathrm{solver}(g), \qquad
          (\theta, q) \leftarrow \mathrm{after}(\theta', q, g, n)

A variant without a schedule shows the adapter as it is. Adapters are judged through `jl.lift`, not
merged, so that methods which have no merged weight (experts per token) are judged too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.variant_study.bench import Bench
from jlora.types import Dynamic, Tree

LAST = 15  # steps at the end of a run whose mean is its training loss
GROUP = 8  # rows that a lane judges at once


def _shown(adapter: jl.Adapter, state: Tree, step: Dynamic, key: Dynamic) -> jl.Adapter:
    del state, step, key
    return adapter


def _kept(
    adapter: jl.Adapter, state: Tree, gradients: Tree, step: Dynamic
) -> tuple[jl.Adapter, Tree]:
    del gradients, step
    return adapter, state


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """What changes on the way. Equal to itself only."""

    start: Callable[[jl.Adapter], Tree] = lambda adapter: ()  # its state
    view: Callable[..., jl.Adapter] = _shown  # (adapter, state, step, key) -> in the loss
    after: Callable[..., tuple[jl.Adapter, Tree]] = _kept  # (adapter, state, gradients, step)
    finish: Callable[[jl.Adapter, Tree], jl.Adapter] = lambda adapter, state: adapter  # judged
    penalty: Callable[[jl.Adapter], jax.Array] = lambda adapter: jnp.zeros(())


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """How lanes are trained; static, so one object for all that share a compilation."""

    solver: Callable[[Dynamic], optax.GradientTransformation]  # of a schedule of rates
    schedule: Schedule
    steps: int
    batch: int  # rows of a step


class Lanes(NamedTuple):
    """Trained lanes."""

    trainable: Tree  # leaves [L, ...]
    state: Tree  # of the schedule, leaves [L, ...]
    loss: np.ndarray  # [L], mean training loss of the last steps


def train(
    bench: Bench, run: Run, base: Tree, adapter: jl.Adapter, rates: np.ndarray, at: np.ndarray,
    seed: int,
) -> Lanes:  # fmt: skip
    """Trains one lane per pair of a rate and a task.

    Args:
      bench: model and rows.
      run: what is done.
      base: parameters; those of the bench, or what an initialisation left of them.
      adapter: the start of all lanes.
      rates: [L], peak learning rates.
      at: [L], numbers of tasks.
      seed: of the rows; every rate of a task sees the same ones.
    """
    args = jnp.asarray(rates, jnp.float32), jnp.asarray(at, jnp.int32), jnp.int32(seed)
    trainable, state, losses = _train(bench, adapter.sites, run, bench.data, base,
                                      adapter.trainable, adapter.frozen, *args)  # fmt: skip
    return Lanes(trainable, state, np.asarray(losses, np.float64)[-LAST:].mean(0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(bench, sites, run, data, base, start, frozen, rates, at, seed):
    model, plan, count = jl.lift(bench.apply), run.schedule, bench.sizes["train"]

    def solver(rate):
        optimizer = run.solver(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / run.steps)))
        return optax.with_extra_args_support(optimizer)

    def loss(one, state, inputs, label, step, key):
        adapter = plan.view(jl.Adapter(one, frozen, sites), state, step, key)
        logits = model(base, adapter, *inputs)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return value + plan.penalty(adapter), value

    def lane(one, solved, state, rate, task, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), step)
        rows = jax.random.randint(key, (run.batch,), 0, count)
        batch = bench.pick(data, "train", task, rows)
        args = (state, *batch, step, jax.random.fold_in(key, 1))
        grads, value = jax.grad(loss, has_aux=True)(one, *args)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, solved = solver(rate).update(grads, solved, one, frozen=frozen)
        moved = jl.Adapter(optax.apply_updates(one, updates), frozen, sites)  # type: ignore[arg-type]
        moved, state = plan.after(moved, state, grads, step)
        return moved.trainable, solved, state, value

    def step(carry, number):
        mapped: Dynamic = jax.vmap(lane, in_axes=(0, 0, 0, 0, 0, None))
        *carry, value = mapped(*carry, rates, at, number)
        return tuple(carry), value

    repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x[None], len(at), axis=0), tree)  # noqa: E731
    every, state = repeat(start), repeat(plan.start(jl.Adapter(start, frozen, sites)))
    with jax.numpy_dtype_promotion("standard"):
        carry = every, jax.vmap(lambda one, rate: solver(rate).init(one))(every, rates), state
    numbers = jnp.arange(run.steps, dtype=jnp.int32)
    (trainable, _, state), losses = jax.lax.scan(step, carry, numbers)
    return trainable, state, losses


def judge(
    bench: Bench, run: Run, base: Tree, adapter: jl.Adapter, lanes: Lanes, split: str,
    at: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The share of labels that each lane gets right, float64 [L].

    Args:
      bench: model and rows.
      run: its schedule says which adapter is judged.
      base: as in `train`.
      adapter: as in `train`; what is frozen.
      lanes: trained ones.
      split: "validation" or "test".
      at: [L], numbers of tasks.
    """
    args = lanes.trainable, lanes.state, jnp.asarray(at, jnp.int32)
    right = _judge(bench, adapter.sites, run.schedule, split, bench.data, base, adapter.frozen,
                   *args)  # fmt: skip
    return np.asarray(right, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _judge(bench, sites, plan, split, data, base, frozen, trainable, state, at):
    model, count = jl.lift(bench.apply), bench.sizes[split]
    groups = -(-count // GROUP)
    rows = jnp.arange(groups * GROUP, dtype=jnp.int32).reshape(groups, GROUP)

    def lane(one):
        adapter = plan.finish(jl.Adapter(one[0], frozen, sites), one[1])

        def group(rows):
            inputs, label = bench.pick(data, split, one[2], jnp.minimum(rows, count - 1))
            right = model(base, adapter, *inputs).argmax(-1).astype(jnp.int32) == label
            share = right.astype(jnp.float32).reshape(GROUP, -1).mean(-1)
            return jnp.where(rows < count, share, 0).sum()

        return jax.lax.map(group, rows).sum() / count

    return jax.lax.map(lane, (trainable, state, at))

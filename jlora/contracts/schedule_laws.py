"""The laws of schedules, measured on two sites in training; `schedule` says what they are."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.contracts.distance import gap, same_bits
from jlora.contracts.schedule import Masks, Schedule, Trainable
from jlora.core.adapter import Adapter
from jlora.core.init import initialise
from jlora.core.site import Site
from jlora.types import Dynamic, Tree


class World(NamedTuple):
    """What the laws are measured on: an adapter of two sites, in training."""

    adapter: Adapter  # all arrays not zero
    moments: Tree  # state of `optax.adam` after the gradients
    gradients: tuple[Trainable, ...]  # one per step of the schedule


def world(record: Schedule, seed: int = 0, example: int = 0) -> World:
    """Random factors of two sites, 7 x 5, and a random gradient per step.

    Args:
      record: the system.
      seed: of the draws.
      example: which of its methods.

    Returns:
      The world.
    """
    rng, paths = np.random.default_rng(seed), ("down", "up")
    sites = [
        (Site(p, (7, 5), "io", np.dtype("float32"), ("dot",)), record.examples[example])
        for p in paths
    ]
    weights = {p: jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for p in paths}
    fresh = initialise(jax.random.key(seed), sites, weights)
    draw = lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    adapter = fresh.replace(trainable=jax.tree.map(draw, fresh.trainable))
    stream = tuple(jax.tree.map(draw, fresh.trainable) for _ in range(record.length))
    rule = optax.adam(0.01)
    moments = rule.init(adapter.trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        for g in stream[:2]:
            _, moments = rule.update(g, moments, adapter.trainable)
    return World(adapter, moments, stream)


def error(law: str, record: Schedule, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds, infinity where something is not finite.
    """
    worst = CHECKS[law](record, at)
    return worst if np.isfinite(worst) else float("inf")


def deltas(adapter: Adapter) -> dict[str, jax.Array]:
    """The change of every weight.

    Args:
      adapter: of methods that have factors.

    Returns:
      path -> [d_in, d_out].

    Raises:
      ValueError: a method without factors.
    """
    out = {}
    for site, method in adapter.sites:
        p = method.prepare({**adapter.frozen[site.path], **adapter.trainable[site.path]})
        factors = method.factors(p)
        if factors is None:
            raise ValueError(f"{site.path}: got {method}, expected a method with factors")
        out[site.path] = factors[0] @ factors[1]
    return out


def gradients(adapter: Adapter) -> Trainable:
    """The gradients of a loss of the deltas that is not linear in them.

    Args:
      adapter: of methods that have factors.

    Returns:
      A tree like `adapter.trainable`.
    """

    def loss(trainable: Trainable) -> jax.Array:
        own = deltas(adapter.replace(trainable=trainable))
        return sum((jnp.sum(jnp.sin(d + 0.3)) for d in own.values()), jnp.zeros(()))

    return jax.grad(loss)(adapter.trainable)


def take(tree: Trainable, adapter: Adapter, masks: Masks) -> dict[str, dict[str, np.ndarray]]:
    """The kept ranks of a tree, by the rank axes of the methods.

    Args:
      tree: like `adapter.trainable`.
      adapter: says which axis of an array is its rank.
      masks: which ranks are kept.

    Returns:
      The tree with smaller arrays, without sites that keep nothing.
    """
    out: dict[str, dict[str, np.ndarray]] = {}
    for site, method in adapter.sites:
        kept = np.flatnonzero(np.asarray(masks[site.path]))
        if not kept.size:
            continue
        arrays = {name: np.asarray(t) for name, t in tree[site.path].items()}
        axes = method.rank_axes
        out[site.path] = {
            name: np.take(t, kept, axes[name]) if name in axes else t for name, t in arrays.items()
        }
    return out


def _observed(record: Schedule, at: World) -> Tree:
    """The state after all steps."""
    state = record.start(at.adapter)
    for g in at.gradients:
        state = record.observe(state, at.adapter, g)
    return state


def _final(record: Schedule, at: World) -> Masks:
    """Masks after all steps.

    Raises:
      ValueError: no rank is dropped, or none is kept, so that laws would say nothing.
    """
    masks = record.masks(_observed(record, at), jnp.int32(record.length))
    kept = np.concatenate([np.asarray(m) for m in masks.values()])
    if kept.dtype != bool or kept.all() or not kept.any():
        raise ValueError(f"{record.name}: got masks {kept}, expected some True and some False")
    return masks


def shrunk(record: Schedule, at: World) -> float:
    """Masked against shrunk: deltas, and gradients of the kept ranks.

    Args and Returns are those of `error`.
    """
    masks = _final(record, at)
    masked = record.mask(at.adapter, masks)
    small, _ = record.shrink(at.adapter, at.moments, masks)
    slopes, want = take(gradients(masked), masked, masks), deltas(masked)
    none = {p: jnp.zeros_like(d) for p, d in want.items()}  # of a site that keeps nothing
    return max(gap(none | deltas(small), want), gap(gradients(small), slopes))


def moments(record: Schedule, at: World) -> float:
    """0, or infinity where the moments of kept ranks, or the count of steps, are others.

    Args and Returns are those of `error`.
    """
    masks = _final(record, at)
    _, shrunk = record.shrink(at.adapter, at.moments, masks)
    adam = at.moments[0]
    want = adam._replace(mu=take(adam.mu, at.adapter, masks), nu=take(adam.nu, at.adapter, masks))
    return 0.0 if same_bits(shrunk, (want, *at.moments[1:])) else float("inf")


def revive(record: Schedule, at: World) -> float:
    """0, or infinity where no factor of a dropped rank has a gradient.

    Args and Returns are those of `error`.
    """
    masks = _final(record, at)
    masked = record.mask(at.adapter, masks)
    slopes = take(gradients(masked), masked, {p: ~m for p, m in masks.items()})
    for site, method in masked.sites:
        if site.path not in slopes:
            continue
        sizes = [
            np.abs(np.moveaxis(t, method.rank_axes[name], 0)).reshape(t.shape[axis], -1).sum(1)
            for name, t in slopes[site.path].items()
            if (axis := method.rank_axes.get(name)) is not None
        ]
        if not (np.sum(sizes, axis=0) > 0).all():
            return float("inf")
    return 0.0


def budget(record: Schedule, at: World) -> float:
    """The largest number of ranks by which a step exceeds its budget.

    Args and Returns are those of `error`.
    """
    state, excess = record.start(at.adapter), 0
    for step, g in enumerate((*at.gradients, at.gradients[-1])):
        masks = record.masks(state, jnp.int32(step))
        kept = sum(int(np.asarray(m).sum()) for m in masks.values())
        excess = max(excess, kept - int(record.budget(at.adapter, step)))
        state = record.observe(state, at.adapter, g)
    return float(excess)


def jit(record: Schedule, at: World) -> float:
    """Jitted against eager at three steps; infinity where it compiles twice, or not at all.

    Args and Returns are those of `error`.
    """
    traced = []

    def run(state: Tree, adapter: Adapter, g: Trainable, step: Dynamic) -> tuple[Tree, Masks, Tree]:
        traced.append(step)
        state = record.observe(state, adapter, g)
        masks = record.masks(state, step)
        return state, masks, deltas(record.mask(adapter, masks))

    compiled, worst = jax.jit(run), 0.0
    state = record.start(at.adapter)
    for step in (0, record.length // 2, record.length):
        args = (state, at.adapter, at.gradients[0], jnp.int32(step))
        before = len(traced)
        try:
            result = compiled(*args)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            return float("inf")
        if len(traced) - before != (step == 0):
            return float("inf")
        worst = max(worst, gap(result, run(*args)))
    return worst


def resume(record: Schedule, at: World) -> float:
    """0, or infinity where a run that is resumed at some step differs from the whole one.

    Args and Returns are those of `error`.
    """
    steps = range(record.length)
    states = [record.start(at.adapter)]
    if not all(isinstance(t, jax.Array) for t in jax.tree.leaves(states)):
        return float("inf")
    for k in steps:
        states.append(record.observe(states[-1], at.adapter, at.gradients[k]))
    want = states[-1], record.masks(states[-1], jnp.int32(record.length))
    for k in steps:
        leaves, form = jax.tree.flatten(states[k])
        state = jax.tree.unflatten(form, [jnp.asarray(np.array(t)) for t in leaves])
        for g in at.gradients[k:]:
            state = record.observe(state, at.adapter, g)
        if not same_bits((state, record.masks(state, jnp.int32(record.length))), want):
            return float("inf")
    return 0.0


def restore(record: Schedule, at: World) -> float:
    """0, or infinity where the state is not what Orbax gives back, or changes its form.

    Args and Returns are those of `error`.
    """
    # slow to import, and a schedule does not need it
    import orbax.checkpoint as ocp

    first, state = record.start(at.adapter), _observed(record, at)
    if not all(isinstance(t, jax.Array) for t in jax.tree.leaves((first, state))):
        return float("inf")
    forms = [jax.tree.map(lambda t: (t.shape, str(t.dtype)), s) for s in (first, state)]
    if forms[0] != forms[1]:
        return float("inf")
    kept = {"adapter": at.adapter.trainable, "moments": at.moments, "state": state}
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as writer:
        writer.save(Path(folder) / "state", kept)
        writer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, kept)
        back = writer.restore(Path(folder) / "state", like)
    return 0.0 if same_bits(back, kept) else float("inf")


CHECKS: Mapping[str, Callable[[Schedule, World], float]] = {
    "shrunk": shrunk,
    "moments": moments,
    "revive": revive,
    "budget": budget,
    "jit": jit,
    "resume": resume,
    "restore": restore,
}

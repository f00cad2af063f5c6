"""The laws of optimizers, measured on two sites in training; `optimizer` says what they are."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.contracts.distance import gap, same_bits
from jlora.contracts.optimizer import LAWS, Optimizer, Trainable, only
from jlora.types import Tree

STEPS = 2  # enough for states to differ from those of the start


class World(NamedTuple):
    """What the laws are measured on: two sites, their factors all different and not zero."""

    trainable: Trainable
    frozen: Trainable  # the scales
    targets: dict[str, jax.Array]  # [*stack, d_in, d_out], what the loss pulls D to


def world(seed: int = 0) -> World:
    """Random factors of two sites, 7 x 5 of rank 3 (of one shape: fewer compilations).

    Args:
      seed: of the draws.

    Returns:
      The world.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    paths = ("down", "up")
    trainable = {p: {"a": draw(7, 3), "b": draw(3, 5)} for p in paths}
    frozen = {p: {"scale": jnp.asarray(k + 0.5)} for k, p in enumerate(paths)}
    return World(trainable, frozen, {p: draw(7, 5) for p in paths})


def error(law: str, record: Optimizer, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds, infinity where something is not finite.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        return CHECKS[law](record, at)


def laws_of(record: Optimizer) -> tuple[str, ...]:
    """The laws that a system can be asked for.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "gauge" of systems that claim it alone.
    """
    return tuple(law for law in LAWS if law != "gauge" or record.gauge)


def deltas(trainable: Trainable, frozen: Trainable) -> dict[str, jax.Array]:
    """D of every site.

    Args:
      trainable: its factors.
      frozen: its scales.

    Returns:
      path -> [*stack, d_in, d_out].
    """
    return {
        p: frozen[p]["scale"][..., None, None].astype(t["a"].dtype) * (t["a"] @ t["b"])
        for p, t in trainable.items()
    }


@jax.jit
def gradients(at: World) -> Trainable:
    """The gradients of a loss that is not quadratic in D, and the sum of those of all sites.

    Args:
      at: the world.

    Returns:
      A tree like `at.trainable`.
    """

    def loss(trainable: Trainable) -> jax.Array:
        by_site = deltas(trainable, at.frozen)
        terms = [
            jnp.sum(jnp.logaddexp(by_site[p] - t, t - by_site[p])) for p, t in at.targets.items()
        ]
        return sum(terms, jnp.zeros((), terms[0].dtype))

    return jax.grad(loss)(at.trainable)


def steps(
    update: Callable[..., tuple[Tree, Tree]], state: Tree, at: World, count: int = STEPS
) -> tuple[Trainable, Tree, World]:
    """Some steps of a transformation.

    Args:
      update: of the transformation.
      state: of its `init`.
      at: the world.
      count: how many steps; two, so that states differ from those of the start.

    Returns:
      (last updates, state, world after them).
    """
    updates = at.trainable
    for _ in range(count):
        updates, state = update(gradients(at), state, at.trainable, frozen=at.frozen)
        at = at._replace(trainable=optax.apply_updates(at.trainable, updates))
    return updates, state, at


def _each(at: World, change: Callable[[Tree], Tree]) -> World:
    """The world with its three trees changed alike."""
    return World(change(at.trainable), change(at.frozen), change(at.targets))


def _rule(record: Optimizer) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(record.make())


def _run(record: Optimizer, at: World) -> Trainable:
    rule = _rule(record)
    return steps(rule.update, rule.init(at.trainable), at)[0]


def restore(record: Optimizer, at: World) -> float:
    """0, or infinity where the state is not what Orbax gives back, or changes its form.

    Args and Returns are those of `error`.
    """
    # slow to import, and an optimizer does not need it
    import orbax.checkpoint as ocp

    rule = _rule(record)
    first = rule.init(at.trainable)
    _, state, _ = steps(rule.update, first, at)
    if not all(isinstance(t, jax.Array) for t in jax.tree.leaves(state)):
        return float("inf")
    forms = [jax.tree.map(lambda t: (t.shape, t.dtype), s) for s in (first, state)]
    if forms[0] != forms[1]:
        return float("inf")
    kept = {"trainable": at.trainable, "state": state}  # Orbax writes no tree without arrays
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as writer:
        writer.save(Path(folder) / "state", kept)
        writer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, kept)
        back = writer.restore(Path(folder) / "state", like)
    return 0.0 if same_bits(back, kept) else float("inf")


def masked(record: Optimizer, at: World) -> float:
    """One of the two sites is trained: against an optimizer that knows no other.

    Args and Returns are those of `error`.
    """
    path, other = at.trainable
    alone = _each(at, lambda part: {path: part[path]})
    rule, small = only(record.make(), (path,)), _rule(record)
    updates, state, _ = steps(rule.update, rule.init(at.trainable), at)
    want, want_state, _ = steps(small.update, small.init(alone.trainable), alone)
    size, want_size = (sum(np.size(t) for t in jax.tree.leaves(s)) for s in (state, want_state))
    if size != want_size or any(np.any(np.asarray(t) != 0) for t in updates[other].values()):
        return float("inf")
    return gap({path: updates[path]}, want)


def zero(record: Optimizer, at: World) -> float:
    """The norm of the first update for gradients of zero, relative to that for others.

    Args and Returns are those of `error`.
    """
    rule = _rule(record)
    state = rule.init(at.trainable)
    none = jax.tree.map(jnp.zeros_like, at.trainable)
    size = []
    for g in (none, gradients(at)):
        updates = jax.tree.leaves(rule.update(g, state, at.trainable, frozen=at.frozen)[0])
        size.append(float(np.sqrt(sum(np.sum(np.asarray(t, "f8") ** 2) for t in updates))))
    return size[0] / size[1] if np.isfinite(size[0]) else float("inf")


def dtype(record: Optimizer, at: World) -> float:
    """0, or infinity where an update has another dtype than its parameter or is not finite.

    Args and Returns are those of `error`.
    """
    for form in (jnp.float32, jnp.bfloat16):
        here = at._replace(
            trainable=jax.tree.map(lambda t, form=form: t.astype(form), at.trainable),
            targets={p: t.astype(form) for p, t in at.targets.items()},
        )
        for t in jax.tree.leaves(_run(record, here)):
            if t.dtype != form or not np.isfinite(np.asarray(t, "f8")).all():
                return float("inf")
    return 0.0


def jit(record: Optimizer, at: World) -> float:
    """Jitted against eager, some steps.

    Args and Returns are those of `error`.
    """
    rule = _rule(record)
    compiled = steps(jax.jit(rule.update), rule.init(at.trainable), at)[0]
    return gap(compiled, _run(record, at))


def names(record: Optimizer, at: World) -> float:
    """Sites that are called otherwise, their order reversed.

    Args and Returns are those of `error`.
    """
    first, second = at.trainable
    called = {first: "z", second: "y"}
    renamed = _each(at, lambda part: {called[p]: part[p] for p in part})
    result = _run(record, renamed)
    return gap({p: result[called[p]] for p in called}, _run(record, at))


def gauge(record: Optimizer, at: World) -> float:
    """The change of D after some steps from (A G, G^-1 B), against that from (A, B).

    Args and Returns are those of `error`.
    """
    rng = np.random.default_rng(1)
    mixed = {}
    for path, t in at.trainable.items():
        mixing = np.eye(t["a"].shape[-1]) + 0.3 * rng.normal(size=2 * t["a"].shape[-1:])
        mixed[path] = {
            "a": jnp.asarray(np.asarray(t["a"], "f8") @ mixing, t["a"].dtype),
            "b": jnp.asarray(np.linalg.solve(mixing, np.asarray(t["b"], "f8")), t["b"].dtype),
        }
    moved = []
    for start in (at, at._replace(trainable=mixed)):
        rule = _rule(record)
        _, _, end = steps(rule.update, rule.init(start.trainable), start)
        pair = deltas(end.trainable, at.frozen), deltas(start.trainable, at.frozen)
        moved.append(jax.tree.map(jnp.subtract, *pair))
    return gap(moved[1], moved[0])


def _slices(at: World, count: int = 2) -> tuple[World, list[World]]:
    """`count` worlds with all arrays stacked, and one by one."""
    each = [at, *(world(seed) for seed in range(1, count))]
    return jax.tree.map(lambda *t: jnp.stack(t), *each), each


def stack(record: Optimizer, at: World) -> float:
    """Sites of two layers, against optimizers of one layer.

    Args and Returns are those of `error`.
    """
    layers, each = _slices(at)
    want = jax.tree.map(lambda *t: jnp.stack(t), *(_run(record, w) for w in each))
    return gap(_run(record, layers), want)


def bank(record: Optimizer, at: World) -> float:
    """Two adapters under `jax.vmap`, against a loop.

    Args and Returns are those of `error`.
    """
    both, each = _slices(at)
    rule = _rule(record)

    def mapped(updates: Tree, state: Tree, params: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        one = lambda g, s, p, f: rule.update(g, s, p, frozen=f)  # noqa: E731
        return jax.vmap(one)(updates, state, params, frozen)

    result = steps(mapped, jax.vmap(rule.init)(both.trainable), both)[0]
    return gap(result, jax.tree.map(lambda *t: jnp.stack(t), *(_run(record, w) for w in each)))


CHECKS: Mapping[str, Callable[[Optimizer, World], float]] = {
    "restore": restore,
    "masked": masked,
    "zero": zero,
    "dtype": dtype,
    "jit": jit,
    "names": names,
    "gauge": gauge,
    "stack": stack,
    "bank": bank,
}

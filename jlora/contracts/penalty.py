r"""Penalties: scalars that are added to a loss and say how far an adapter is from a form.

A system gives ``penalty(adapter, params, ctx) -> []``: of an adapter (its sites say how arrays are
laid out), the frozen weights alongside it, and what the model's context holds. Gradients are taken
by `adapter.trainable`.

Laws, each an error relative to the value (or gradient) of a random adapter, 0 where it holds:

===========  ===============================================================================
finite       value and gradient are finite: random, at the start, and with all arrays zero
positive     no value is negative
zero         it is zero at `Penalty.zero` of an adapter (systems that claim where)
jit          jitted is eager, value and gradient
additive     of all sites it is the sum of those of each alone (systems that claim it)
gradient     along a direction it is the central difference, in float64
thin         neither value nor gradient makes an array of the size of a weight
===========  ===============================================================================
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.init import initialise
from jlora.core.site import Arrays, Site
from jlora.system import System
from jlora.types import Dynamic, Tree

LAWS = ("finite", "positive", "zero", "jit", "additive", "gradient", "thin")
SHAPES = {"down": (11, 13), "layers/up": (2, 13, 11)}  # path -> leaf; the second a stack of two
STEP = 1e-5  # of the central difference, whose error is of the size of its square

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalty(System):
    """The record of a penalty; `examples` are the adaptation methods that it is tried on.

    Attributes:
      penalty: (adapter, params, ctx) -> [], at least float32.
      zero: an adapter -> one like it whose penalty is claimed to be zero; None: no claim.
      additive: whether it is claimed to be a sum over sites.
      ctx: what the laws pass for ctx.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/penalty_test.py",)

    penalty: Callable[[Adapter, Params, Mapping[str, Dynamic]], jax.Array]
    zero: Callable[[Adapter], Adapter] | None = None
    additive: bool = False
    ctx: Mapping[str, Dynamic] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        System.__post_init__(self)
        if not self.examples:
            raise ValueError(f"{self.name}: examples: got none, expected adaptation methods")


class World(NamedTuple):
    """What the laws are measured on: the two sites of `SHAPES`, of one method."""

    fresh: Adapter
    adapter: Adapter  # the same with noise on all that is trained
    params: Params


def world(record: Penalty, seed: int = 0, example: int = 0) -> World:
    """Random weights, and an adapter of one of the record's methods.

    Args:
      record: the system.
      seed: of the draws.
      example: which of its methods.

    Returns:
      The world.
    """
    rng = np.random.default_rng(seed)
    params = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}
    sites = [
        (Site(p, s, "sio"[-len(s) :], np.dtype("float32"), ("dot",)), record.examples[example])
        for p, s in SHAPES.items()
    ]
    fresh = initialise(jax.random.key(seed), sites, params)
    move = lambda t: t + jnp.asarray(0.3 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return World(fresh, fresh.replace(trainable=jax.tree.map(move, fresh.trainable)), params)


def error(law: str, record: Penalty, at: World) -> float:
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


def laws_of(record: Penalty) -> tuple[str, ...]:
    """The laws that a system can be asked for.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "zero" and "additive" of systems that claim them alone.
    """
    claims = {"zero": record.zero is not None, "additive": record.additive}
    return tuple(law for law in LAWS if claims.get(law, True))


def value(record: Penalty, adapter: Adapter, params: Params) -> float:
    """The penalty as a number.

    Args:
      record: the system.
      adapter: what is penalised.
      params: the frozen weights.

    Returns:
      A Python float.

    Raises:
      ValueError: it is no scalar, or of a dtype below float32.
    """
    result = record.penalty(adapter, params, record.ctx)
    if result.shape != () or result.dtype.itemsize < 4:
        raise ValueError(f"{record.name}: got {result.shape} {result.dtype}, expected a float32 []")
    return float(result)


def _sloped(record: Penalty, adapter: Adapter, params: Params) -> Callable[..., Tree]:
    """A function of the trainable arrays that gives value and gradient."""
    return jax.value_and_grad(
        lambda t: record.penalty(adapter.replace(trainable=t), params, record.ctx)
    )


def _flat(tree: Tree) -> np.ndarray:
    return np.concatenate([np.asarray(t, "f8").ravel() for t in jax.tree.leaves(tree)])


def finite(record: Penalty, at: World) -> float:
    """0, or infinity where a value or an entry of a gradient is not finite.

    Args and Returns are those of `error`.
    """
    empty = at.fresh.replace(trainable=jax.tree.map(jnp.zeros_like, at.fresh.trainable))
    for adapter in (at.adapter, at.fresh, empty):
        slopes = _sloped(record, adapter, at.params)(adapter.trainable)
        if not np.isfinite(_flat(slopes)).all():
            return float("inf")
    return 0.0


def positive(record: Penalty, at: World) -> float:
    """The most negative of the values: random, at the start, small, large.

    Args and Returns are those of `error`.
    """
    values = [
        value(record, at.adapter.replace(trainable=_scaled(t, size)), at.params)
        for t in (at.adapter.trainable, at.fresh.trainable)
        for size in (0.0, 0.1, 1.0, -3.0)
    ]
    return max(0.0, -min(values)) / max(abs(v) for v in values)


def _scaled(tree: dict[str, Arrays], size: float) -> dict[str, Arrays]:
    return jax.tree.map(lambda t: t * jnp.asarray(size, t.dtype), tree)


def zero(record: Penalty, at: World) -> float:
    """The value where it is claimed to be zero, by that of the random adapter.

    Args and Returns are those of `error`.
    """
    assert record.zero is not None
    result = value(record, record.zero(at.adapter), at.params)
    return abs(result) / abs(value(record, at.adapter, at.params))


def jit(record: Penalty, at: World) -> float:
    """Jitted against eager.

    Args and Returns are those of `error`.
    """
    sloped = _sloped(record, at.adapter, at.params)
    eager, compiled = (_flat(f(at.adapter.trainable)) for f in (sloped, jax.jit(sloped)))
    return float(np.linalg.norm(compiled - eager) / np.linalg.norm(eager))


def additive(record: Penalty, at: World) -> float:
    """The sum over adapters of one site.

    Args and Returns are those of `error`.
    """
    whole = value(record, at.adapter, at.params)
    alone = [at.adapter.replace(sites=(pair,)) for pair in at.adapter.sites]
    parts = [
        a.replace(
            trainable={a.sites[0][0].path: a.trainable[a.sites[0][0].path]},
            frozen={a.sites[0][0].path: a.frozen[a.sites[0][0].path]},
        )
        for a in alone
    ]
    return abs(sum(value(record, a, at.params) for a in parts) - whole) / abs(whole)


def gradient(record: Penalty, at: World) -> float:
    """The derivative along a random direction against the central difference, in float64.

    Args and Returns are those of `error`.
    """
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        wide = lambda t: jnp.asarray(np.asarray(t, "f8"))  # noqa: E731
        adapter, params = jax.tree.map(wide, at.adapter), jax.tree.map(wide, at.params)
        along = jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape)), adapter.trainable)

        def moved(step: float) -> float:
            there = jax.tree.map(lambda t, v: t + step * v, adapter.trainable, along)
            return value(record, adapter.replace(trainable=there), params)

        slope = _sloped(record, adapter, params)(adapter.trainable)[1]
        directional = float(_flat(slope) @ _flat(along))
        want = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    return abs(directional - want) / max(abs(want), 1e-30)


def thin(record: Penalty, at: World) -> float:
    """0, or infinity where value or gradient makes an array as large as a weight on its way.

    Args and Returns are those of `error`.
    """

    def run(trainable: Tree, frozen: Tree, params: Params) -> Tree:
        adapter = at.adapter.replace(frozen=frozen)
        return _sloped(record, adapter, params)(trainable)

    program = jax.make_jaxpr(run)(at.adapter.trainable, at.adapter.frozen, at.params)
    weight = min(int(np.prod(s[-2:])) for s in SHAPES.values())
    return float("inf") if max(_sizes(program.jaxpr), default=0) >= weight else 0.0


def _sizes(jaxpr: Dynamic) -> Iterator[int]:
    """Elements of every array that a program and its inner programs make."""
    for e in jaxpr.eqns:
        yield from (getattr(v.aval, "size", 0) for v in e.outvars)
        for inner in jax.tree.leaves(tuple(e.params.values()), is_leaf=_program):
            if _program(inner):
                yield from _sizes(getattr(inner, "jaxpr", inner))


def _program(x: Dynamic) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


CHECKS: Mapping[str, Callable[[Penalty, World], float]] = {
    "finite": finite,
    "positive": positive,
    "zero": zero,
    "jit": jit,
    "additive": additive,
    "gradient": gradient,
    "thin": thin,
}

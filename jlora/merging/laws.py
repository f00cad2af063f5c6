"""The laws of merging, as errors: what `table.LAWS` says, measured on one bank.

====  ====================================================================
Δ     merged delta of a site; |.| the Frobenius norm over its slices
====  ====================================================================

.. math:: \\mathrm{error} = \\max_{\\text{sites}} |\\Delta_1 - \\Delta_2| \\, / \\, |\\text{inputs}|

`error(law, row, world)` is 0 where a law holds exactly, about the precision where it holds, and
not small where it is broken; infinite where something is not finite. Deltas are compared densely:
this is for tests on tiny banks.

Source: our reading.
Deviates: nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.core import algebra
from jlora.core.algebra import Deltas, LowRank
from jlora.merging.run import apply, bound
from jlora.merging.table import Merging

Errors = dict[str, float]  # path -> error


class World(NamedTuple):
    """The inputs that the laws are measured on."""

    bank: Deltas  # N >= 3 adapters
    weights: Array  # [N], all different, summing to 1
    key: Array  # of randomised methods, and of the gauge
    mesh: Mesh | None = None  # axes "d" (divides d_in, d_out) and "s" (divides the stack, if any)


def laws_of(row: Merging) -> list[str]:
    """The laws that a row can be asked for."""
    return [law for law in CHECKS if law != "certificate" or row.certificate is not None]


def error(law: str, row: Merging, world: World) -> float:
    """The error of a law, relative to the norm of the bank, at the site where it is largest."""
    return max(errors(law, row, world).values())


def errors(law: str, row: Merging, world: World) -> dict[str, float]:
    """{path: error}; a law that is no comparison of deltas has one error, under ""."""
    if row.size is not None:
        w = world.weights[: row.size]
        world = world._replace(bank=_take(world.bank, slice(row.size)), weights=w / jnp.sum(w))
    got = CHECKS[law](row, world)
    size = {p: float(algebra.norm({p: d})) for p, d in world.bank.items()} if len(got) > 1 else {}
    gaps = {path: gap / size.get(path, 1.0) for path, gap in got.items()}
    return {path: gap if np.isfinite(gap) else float("inf") for path, gap in gaps.items()}


def weight_one(row: Merging, world: World) -> Errors:
    """One adapter of weight 1; where a method takes a fixed number, the others weigh 0."""
    if row.size is None:
        return _gap(_merge(row, world, _take(world.bank, slice(1)), [1.0]), _first(world.bank))
    w = [1.0] + [0.0] * (row.size - 1)
    return _gap(_merge(row, world, world.bank, w), _first(world.bank))


def idempotent(row: Merging, world: World) -> Errors:
    """Equal adapters, weights that sum to 1."""
    same = jax.tree.map(lambda t: jnp.broadcast_to(t[:1], t.shape), world.bank)
    return _gap(_merge(row, world, same), _first(world.bank))


def permutation(row: Merging, world: World) -> Errors:
    """The adapters in another order, with their weights and ids."""
    order = np.roll(np.arange(world.weights.shape[0]), 1)
    bank, w = _take(world.bank, order), world.weights[order]
    ids = order.astype(np.uint32)
    return _gap(_merge(row, world, bank, w, ids=ids), _merge(row, world))


def gauge(row: Merging, world: World) -> Errors:
    """(u G, G^-1 v), another G for each site, slice and adapter."""

    def turned(k: int, low: LowRank) -> LowRank:
        shape = (*low.u.shape[:-2], low.u.shape[-1], low.u.shape[-1])
        g, _ = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(world.key, k), shape))
        grow = jnp.linspace(0.5, 2.0, shape[-1])
        g = (g * grow.reshape(*[1] * (g.ndim - 1), -1)).astype(low.u.dtype)
        return LowRank(low.u @ g, jnp.linalg.inv(g) @ low.v)

    bank = {p: turned(k, low) for k, (p, low) in enumerate(world.bank.items())}  # type: ignore[arg-type]
    return _gap(_merge(row, world, bank), _merge(row, world))


def certificate(row: Merging, world: World) -> Errors:
    """The excess of the true error over its bound; the difference where the bound is tight."""
    w = _dense(algebra.combine(world.bank, world.weights))
    made = _dense(_merge(row, world))
    out = {}
    for path, limit in bound(row, world.bank, world.weights, **row.options).items():
        true = np.sqrt(((w[path] - made[path]) ** 2).sum((-2, -1)))
        gap = true - np.asarray(limit, np.float64)
        out[path] = float((np.abs(gap) if row.tight else gap).max())
    return out


def jit(row: Merging, world: World) -> Errors:
    """Jitted against not jitted."""
    return _gap(_merge(row, world, jit=False), _merge(row, world))


def sharded(row: Merging, world: World) -> Errors:
    """Rows, columns and layers spread over devices, against one device."""
    if world.mesh is None:
        raise ValueError("world.mesh: got None, expected a mesh")

    def put(t: Array, axis: int) -> Array:
        spec: list[Any] = [None] * t.ndim
        spec[axis] = "d"
        if t.ndim > 3:
            spec[1] = "s"
        return jax.device_put(t, NamedSharding(world.mesh, PartitionSpec(*spec)))  # type: ignore[arg-type]

    bank = {path: LowRank(put(d[0], -2), put(d[1], -1)) for path, d in world.bank.items()}
    return _gap(_merge(row, world, bank), _merge(row, world))


def gradient(row: Merging, world: World) -> Errors:
    """Zero where the gradient by weights and factors is finite and not all zero."""

    def f(bank: Deltas, w: Array) -> Array:
        made = apply(row, bank, w, key=world.key if row.randomised else None, **row.options)
        return sum((jnp.sum(jnp.sin(u @ v)) for u, v in made.values()), jnp.zeros(()))  # type: ignore[misc]

    grads = jax.tree.leaves(jax.jit(jax.grad(f, (0, 1)))(world.bank, world.weights))
    size = sum(float(jnp.sum(jnp.abs(g))) for g in grads)
    return {"": 0.0 if np.isfinite(size) and size > 0 else float("inf")}


def memory(row: Merging, world: World) -> Errors:
    """Zero where no array of the program on a large site is a quarter of a dense delta or more."""
    n, width = world.weights.shape[0], 4096
    u, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, width, 4), (n, 4, width)))

    def f(bank: Deltas, w: Array) -> Deltas:
        return _merge(row, world._replace(weights=w), bank, w, jit=False)

    jaxpr = jax.make_jaxpr(f)({"x": LowRank(u, v)}, world.weights).jaxpr  # type: ignore[arg-type]
    return {"": 0.0 if 4 * max(_sizes(jaxpr)) < width * width else float("inf")}


def _sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every array that a program and its inner programs make."""
    for e in jaxpr.eqns:
        yield from (getattr(v.aval, "size", 0) for v in e.outvars)
        for value in jax.tree.leaves(tuple(e.params.values()), is_leaf=_program):
            if _program(value):
                yield from _sizes(getattr(value, "jaxpr", value))


def _program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


CHECKS: dict[str, Callable[[Merging, World], Errors]] = {
    f.__name__: f
    for f in (
        weight_one,
        idempotent,
        permutation,
        gauge,
        certificate,
        jit,
        sharded,
        gradient,
        memory,
    )
}


def _merge(row, world, bank=None, weights=None, ids=None, jit=True) -> Deltas:
    bank = world.bank if bank is None else bank
    w = world.weights if weights is None else jnp.asarray(weights, world.weights.dtype)
    key = world.key if row.randomised else None
    ids = jnp.arange(w.shape[0], dtype=jnp.uint32) if ids is None else jnp.asarray(ids)
    extra = {"ids": ids} if row.randomised else {}
    return apply(row, bank, w, key=key, jit=jit, **extra, **row.options)


def _take(bank: Deltas, rows: Any) -> Deltas:
    return jax.tree.map(lambda t: t[rows], bank)


def _first(bank: Deltas) -> Deltas:
    return jax.tree.map(lambda t: t[0], bank)


def _dense(x: Deltas) -> dict[str, np.ndarray]:
    pairs = {path: (np.asarray(d[0], np.float64), np.asarray(d[1], np.float64)) for path, d in
             x.items()}  # fmt: skip
    return {path: u @ v for path, (u, v) in pairs.items()}


def _gap(x: Deltas, y: Deltas) -> Errors:
    a, b = _dense(x), _dense(y)
    return {p: float(np.sqrt(((a[p] - b[p]) ** 2).sum())) for p in b}

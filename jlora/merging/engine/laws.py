"""The laws of merging, as errors: what `table.LAWS` says, measured on one bank.

Δ is the merged delta of a site, |.| the Frobenius norm over its slices:

.. math:: \\mathrm{error} = \\max_{\\text{sites}} |\\Delta_1 - \\Delta_2| \\, / \\, |\\text{inputs}|

The laws of derivatives are in `derivatives`.

`error(law, row, world)` is 0 where a law holds exactly, about the precision where it holds, and
not small where it is broken; infinite where something is not finite. Deltas are compared densely:
this is for tests on tiny banks.

Deviates: nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jlora import algebra, numerics
from jlora.algebra import Deltas, LowRank
from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.merging.engine.derivatives import difference, gradient
from jlora.merging.engine.inputs import gather, to_adapter
from jlora.merging.engine.law_world import Errors, World, dense, first, gap, merged, take
from jlora.merging.engine.run import bound, checked
from jlora.merging.engine.table import Merging
from jlora.methods.low_rank.lora import LoRA


def laws_of(row: Merging) -> list[str]:
    """The laws that a row can be asked for."""
    return [law for law in CHECKS if law != "certificate" or row.certificate is not None]


def error(law: str, row: Merging, world: World) -> float:
    """The error of a law, relative to the norm of the bank, at the site where it is largest."""
    return max(errors(law, row, world).values())


def errors(law: str, row: Merging, world: World) -> dict[str, float]:
    """{path: error}; a law that is no comparison of deltas has other names, as ""."""
    if row.size is not None:
        w = world.weights[: row.size]
        world = world._replace(bank=take(world.bank, slice(row.size)), weights=w / jnp.sum(w))
    got = CHECKS[law](row, world)
    size = {p: float(algebra.norm({p: world.bank[p]})) for p in got if p in world.bank}
    gaps = {path: gap / size.get(path, 1.0) for path, gap in got.items()}
    return {path: gap if np.isfinite(gap) else float("inf") for path, gap in gaps.items()}


def weight_one(row: Merging, world: World) -> Errors:
    """One adapter of weight 1; where a method takes a fixed number, the others weigh 0."""
    if row.size is None:
        return gap(merged(row, world, take(world.bank, slice(1)), [1.0]), first(world.bank))
    w = [1.0] + [0.0] * (row.size - 1)
    return gap(merged(row, world, world.bank, w), first(world.bank))


def minus_one(row: Merging, world: World) -> Errors:
    """One adapter of weight -1 (the others of a fixed number weigh 0), against minus weight 1."""
    size = row.size or 1
    bank, w = take(world.bank, slice(size)), np.eye(size)[0]
    if not row.signed:
        return _refused(row, bank, -w)
    return gap(merged(row, world, bank, -w), algebra.scale(merged(row, world, bank, w), -1.0))


def signs(row: Merging, world: World) -> Errors:
    """Weights of both signs, against positive ones of adapters of both signs."""
    sign = np.where(np.arange(world.weights.shape[0]) % 2, -1.0, 1.0).astype(np.float32)
    if not row.signed:
        return _refused(row, world.bank, world.weights * sign)

    def turned(low: LowRank) -> LowRank:
        return LowRank(low.u * sign.reshape(-1, *[1] * (low.u.ndim - 1)), low.v)

    bank = {p: turned(low) for p, low in world.bank.items()}  # type: ignore[arg-type]
    return gap(merged(row, world, weights=world.weights * sign), merged(row, world, bank))


def absent(row: Merging, world: World) -> Errors:
    """One adapter with others of weight 0, whatever those are; and all of weight 0, against 0."""
    n = world.weights.shape[0]
    nothing = dense(merged(row, world, weights=np.zeros(n)))
    out = {p: float(np.sqrt((d**2).sum())) for p, d in nothing.items()}
    others = jax.tree.map(lambda t: t.at[1:].set(t[1:][::-1] - 0.5 * t[:1]), world.bank)
    one = np.eye(n)[0]
    gaps = gap(merged(row, world, others, one), merged(row, world, weights=one))
    return {p: float(np.maximum(gap, out[p])) for p, gap in gaps.items()}


def bounded(row: Merging, world: World) -> Errors:
    """How far the norm is beyond 4 sums of norms, for weights whose sum nearly vanishes.

    The adapters are nearly equal, so that those which agree on a sign can be of opposite weights.
    """
    n = world.weights.shape[0]
    near: Deltas = {}
    for path, (u, v) in world.bank.items():  # type: ignore[misc]
        near[path] = LowRank(u[:1] + 0.05 * u, jnp.broadcast_to(v[:1], v.shape))
    w = np.array([1.0, -0.999, 1e-3, *[0.0] * n])[:n]
    if not row.signed:
        return _refused(row, world.bank, w)
    made, each = dense(merged(row, world, near, w)), dense(near)
    out = {}
    for path, d in made.items():
        size = np.sqrt((each[path] ** 2).reshape(n, -1).sum(1)).sum()
        out[path] = float(np.maximum(np.sqrt((d**2).sum()) - 4 * size, 0.0))  # nan stays
    return out


def bank(row: Merging, world: World) -> Errors:
    """Adapters in a list, against one Adapter whose arrays lead with an axis of them."""
    sites = []
    for path, (u, v) in world.bank.items():  # type: ignore[misc]
        shape, kinds = (*u.shape[1:-1], v.shape[-1]), "s" * (u.ndim - 3) + "io"
        sites.append(Site(path, shape, kinds, jnp.dtype("float32"), ("dot",)))
    many = [to_adapter(take(world.bank, k), sites) for k in range(world.weights.shape[0])]
    one, other = (gather(given, world.weights) for given in (to_adapter(world.bank, sites), many))
    return gap(
        merged(row, world, one.bank, one.weights), merged(row, world, other.bank, other.weights)
    )


def _refused(row: Merging, bank: Deltas, w: Any) -> Errors:
    """Zero where the weights are refused by name, else infinite."""
    try:
        checked(row, bank, jnp.asarray(w, jnp.float32), jax.random.key(0), row.options)
    except ValueError as error:
        if str(error).startswith(f"{row.name}: weights: got "):
            return {"": 0.0}
    return {"": float("inf")}


def idempotent(row: Merging, world: World) -> Errors:
    """Equal adapters, weights that sum to 1."""
    same = jax.tree.map(lambda t: jnp.broadcast_to(t[:1], t.shape), world.bank)
    return gap(merged(row, world, same), first(world.bank))


def permutation(row: Merging, world: World) -> Errors:
    """The adapters in another order, with their weights and ids."""
    order = np.roll(np.arange(world.weights.shape[0]), 1)
    bank, w = take(world.bank, order), world.weights[order]
    ids = order.astype(np.uint32)
    return gap(merged(row, world, bank, w, ids=ids), merged(row, world))


def gauge(row: Merging, world: World) -> Errors:
    """(u G, G^-1 v), another G for each site, slice and adapter."""

    def turned(k: int, low: LowRank) -> LowRank:
        shape = (*low.u.shape[:-2], low.u.shape[-1], low.u.shape[-1])
        g, _ = numerics.qr(jax.random.normal(jax.random.fold_in(world.key, k), shape))
        grow = jnp.linspace(0.5, 2.0, shape[-1])
        g = (g * grow.reshape(*[1] * (g.ndim - 1), -1)).astype(low.u.dtype)
        return LowRank(low.u @ g, numerics.inv(g) @ low.v)

    bank = {p: turned(k, low) for k, (p, low) in enumerate(world.bank.items())}  # type: ignore[arg-type]
    return gap(merged(row, world, bank), merged(row, world))


def certificate(row: Merging, world: World) -> Errors:
    """The excess of the true error over its bound; the difference where the bound is tight."""
    w = dense(algebra.combine(world.bank, world.weights))
    made = dense(merged(row, world))
    out = {}
    for path, limit in bound(row, world.bank, world.weights, row.options).items():
        true = np.sqrt(((w[path] - made[path]) ** 2).sum((-2, -1)))
        gap = true - np.asarray(limit, np.float64)
        out[path] = float((np.abs(gap) if row.tight else gap).max())
    return out


def jit(row: Merging, world: World) -> Errors:
    """Jitted against not jitted."""
    return gap(merged(row, world, jit=False), merged(row, world))


def sharded(row: Merging, world: World) -> Errors:
    """Rows, columns and layers spread over devices, against one device.

    What is spread depends on shapes alone: one site without and one with layers are measured, in a
    program of their own, against the same sites in the program of all (a merge of all sites at once
    takes all).
    """
    if world.mesh is None:
        raise ValueError("world.mesh: got None, expected a mesh")

    def put(t: Array, axis: int) -> Array:
        spec: list[Any] = [None] * t.ndim
        spec[axis] = "d"
        if t.ndim > 3:
            spec[1] = "s"
        return jax.device_put(t, NamedSharding(world.mesh, PartitionSpec(*spec)))  # type: ignore[arg-type]

    one_of_each = {low[0].ndim: path for path, low in world.bank.items()}.values()
    paths = world.bank if row.scope == "adapter" else one_of_each
    bank: Deltas = {}
    for path in paths:
        u, v = world.bank[path][0], world.bank[path][1]
        bank[path] = LowRank(put(u, -2), put(v, -1))
    one_device = merged(row, world)
    return gap(merged(row, world, bank), {path: one_device[path] for path in bank})


def memory(row: Merging, world: World) -> Errors:
    """Zero where no array of the program on a large site is a quarter of a dense delta or more."""
    n, width = world.weights.shape[0], 4096
    u, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, width, 4), (n, 4, width)))

    def f(bank: Deltas, w: Array) -> Deltas:
        return merged(row, world._replace(weights=w), bank, w, jit=False)

    jaxpr = jax.make_jaxpr(f)({"x": LowRank(u, v)}, world.weights).jaxpr  # type: ignore[arg-type]
    return {"": 0.0 if 4 * max(_sizes(jaxpr)) < width * width else float("inf")}


def dtypes(row: Merging, world: World) -> Errors:
    """Adapters and factors kept in 16 bits, against the same numbers in float32."""
    half, exact = (_kept(world.bank, jnp.bfloat16, kind) for kind in (jnp.bfloat16, jnp.float32))
    factor = 0.7  # no number of 8 bits
    read = gather(_adapters(half, factor)).bank
    scaled = {p: LowRank(u, v * jnp.float32(factor)) for p, (u, v) in exact.items()}  # type: ignore[misc]
    out = gap(merged(row, world, read), merged(row, world, scaled))
    half, exact = (_kept(world.bank, jnp.float16, kind) for kind in (jnp.float16, jnp.float32))
    made = merged(row, world, half)
    gaps = gap(made, merged(row, world, exact))
    wide = {p: all(t.dtype == jnp.float32 for t in d) for p, d in made.items()}
    return {p: max(e, gaps[p]) if wide[p] else float("inf") for p, e in out.items()}


def _kept(bank: Deltas, kept: Any, dtype: Any) -> Deltas:
    """A bank rounded to `kept`, in `dtype`."""
    return jax.tree.map(lambda t: t.astype(kept).astype(dtype), bank)


def _adapters(bank: Deltas, scale: float) -> Adapter:
    """LoRA adapters of factors [N, *stack, ...], their scale in float32."""
    trainable, frozen, rows = {}, {}, []
    for path, (u, v) in bank.items():  # type: ignore[misc]
        shape, rank = (*u.shape[1:-1], v.shape[-1]), u.shape[-1]
        site = Site(path, shape, "s" * (len(shape) - 2) + "io", jnp.dtype(jnp.float32))
        trainable[path] = {"a": u, "b": v}
        frozen[path] = {"scale": jnp.full(u.shape[:-2], scale, jnp.float32)}
        rows.append((site, LoRA(rank=rank)))
    return Adapter(trainable, frozen, tuple(rows))


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
        minus_one,
        signs,
        absent,
        bounded,
        bank,
        idempotent,
        permutation,
        gauge,
        certificate,
        jit,
        sharded,
        gradient,
        difference,
        memory,
        dtypes,
    )
}

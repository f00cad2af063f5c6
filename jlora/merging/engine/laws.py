"""The laws of merging, as errors: what `table.LAWS` says, measured on one bank.

=====  ====================================================================
Δ      merged delta of a site; |.| the Frobenius norm over its slices
F(x)   sum of sin(Δ), x the weights or the factors of a site
g      gradient of F as jitted, float32
d, h   a random direction; a step, in float64
=====  ====================================================================

.. math:: \\mathrm{error} = \\max_{\\text{sites}} |\\Delta_1 - \\Delta_2| \\, / \\, |\\text{inputs}|

.. math:: \\langle g, d \\rangle = \\frac{F(x + h d) - F(x - h d)}{2 h}

`error(law, row, world)` is 0 where a law holds exactly, about the precision where it holds, and
not small where it is broken; infinite where something is not finite. Deltas are compared densely:
this is for tests on tiny banks.

Deviates: nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import algebra, numerics
from jlora.algebra import Deltas, LowRank
from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.merging.engine.inputs import gather, to_adapter
from jlora.merging.engine.run import apply, bound, checked
from jlora.merging.engine.table import Merging
from jlora.methods.low_rank.lora import LoRA

Errors = dict[str, float]  # path -> error
STEP = 1e-7  # of central differences in float64: few elements are so near to a kink
SLACK = 10  # of gradients in float32, alongside deltas in float32


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
    """{path: error}; a law that is no comparison of deltas has other names, as ""."""
    if row.size is not None:
        w = world.weights[: row.size]
        world = world._replace(bank=_take(world.bank, slice(row.size)), weights=w / jnp.sum(w))
    got = CHECKS[law](row, world)
    size = {p: float(algebra.norm({p: world.bank[p]})) for p in got if p in world.bank}
    gaps = {path: gap / size.get(path, 1.0) for path, gap in got.items()}
    return {path: gap if np.isfinite(gap) else float("inf") for path, gap in gaps.items()}


def weight_one(row: Merging, world: World) -> Errors:
    """One adapter of weight 1; where a method takes a fixed number, the others weigh 0."""
    if row.size is None:
        return _gap(_merge(row, world, _take(world.bank, slice(1)), [1.0]), _first(world.bank))
    w = [1.0] + [0.0] * (row.size - 1)
    return _gap(_merge(row, world, world.bank, w), _first(world.bank))


def minus_one(row: Merging, world: World) -> Errors:
    """One adapter of weight -1 (the others of a fixed number weigh 0), against minus weight 1."""
    size = row.size or 1
    bank, w = _take(world.bank, slice(size)), np.eye(size)[0]
    if not row.signed:
        return _refused(row, bank, -w)
    return _gap(_merge(row, world, bank, -w), algebra.scale(_merge(row, world, bank, w), -1.0))


def signs(row: Merging, world: World) -> Errors:
    """Weights of both signs, against positive ones of adapters of both signs."""
    sign = np.where(np.arange(world.weights.shape[0]) % 2, -1.0, 1.0).astype(np.float32)
    if not row.signed:
        return _refused(row, world.bank, world.weights * sign)

    def turned(low: LowRank) -> LowRank:
        return LowRank(low.u * sign.reshape(-1, *[1] * (low.u.ndim - 1)), low.v)

    bank = {p: turned(low) for p, low in world.bank.items()}  # type: ignore[arg-type]
    return _gap(_merge(row, world, weights=world.weights * sign), _merge(row, world, bank))


def absent(row: Merging, world: World) -> Errors:
    """One adapter with others of weight 0, whatever those are; and all of weight 0, against 0."""
    n = world.weights.shape[0]
    nothing = _dense(_merge(row, world, weights=np.zeros(n)))
    out = {p: float(np.sqrt((d**2).sum())) for p, d in nothing.items()}
    others = jax.tree.map(lambda t: t.at[1:].set(t[1:][::-1] - 0.5 * t[:1]), world.bank)
    one = np.eye(n)[0]
    gaps = _gap(_merge(row, world, others, one), _merge(row, world, weights=one))
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
    made, each = _dense(_merge(row, world, near, w)), _dense(near)
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
    many = [to_adapter(_take(world.bank, k), sites) for k in range(world.weights.shape[0])]
    one, other = (gather(given, world.weights) for given in (to_adapter(world.bank, sites), many))
    return _gap(
        _merge(row, world, one.bank, one.weights), _merge(row, world, other.bank, other.weights)
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
        g, _ = numerics.qr(jax.random.normal(jax.random.fold_in(world.key, k), shape))
        grow = jnp.linspace(0.5, 2.0, shape[-1])
        g = (g * grow.reshape(*[1] * (g.ndim - 1), -1)).astype(low.u.dtype)
        return LowRank(low.u @ g, numerics.inv(g) @ low.v)

    bank = {p: turned(k, low) for k, (p, low) in enumerate(world.bank.items())}  # type: ignore[arg-type]
    return _gap(_merge(row, world, bank), _merge(row, world))


def certificate(row: Merging, world: World) -> Errors:
    """The excess of the true error over its bound; the difference where the bound is tight."""
    w = _dense(algebra.combine(world.bank, world.weights))
    made = _dense(_merge(row, world))
    out = {}
    for path, limit in bound(row, world.bank, world.weights, row.options).items():
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
    """Zero where the gradient by weights and factors of each slice is finite and not all zero."""
    x, names, key = _moved(row, world)
    slopes = _slopes(x, key, *_static(row))
    sizes = [
        np.abs(_rows(t, paths)).sum(1)
        for k, paths in names.items()
        for t in jax.tree.leaves(slopes[k])
    ]
    return {"": 0.0 if all((np.isfinite(s) & (s > 0)).all() for s in sizes) else float("inf")}


def difference(row: Merging, world: World) -> Errors:
    """That gradient along a random direction, against a central difference in float64.

    Each site has an error for its factors and one for its weights, relative to the derivative and
    to the root of the sum of squares of its terms g_i d_i, whichever is larger; a `SLACK`-th of it.
    """
    (x, names, key), rng = _moved(row, world), np.random.default_rng(12)
    x = jax.tree.map(lambda t: _beside(t, rng), x, is_leaf=lambda t: isinstance(t, LowRank))
    slopes = _slopes(x, key, *_static(row))
    x = jax.tree.map(lambda t: np.asarray(t, np.float64), x)
    # what is zero stays zero: the rank that is padded is an edge of many merges
    d = jax.tree.map(lambda t: rng.normal(size=t.shape) * (t != 0), x)
    out: Errors = {}
    for part, what in enumerate(("factors", "weights")):
        up, down = (_at(row, key, x, d, part, h) for h in (STEP, -STEP))
        for k, paths in names.items():
            true = (up[k] - down[k]) / (2 * STEP)  # [S]
            terms = jax.tree.map(lambda g, t: np.asarray(g, np.float64) * t, slopes[k], d[k])
            leaves = jax.tree.leaves(terms[part])
            each = np.concatenate([_rows(t, paths) for t in leaves], axis=1)
            size = np.maximum(np.abs(true), np.linalg.norm(each, axis=1)) * SLACK
            for path, gap in zip(paths, np.abs(each.sum(1) - true) / size, strict=True):
                name = f"{what} of {path}"
                out[name] = float(np.maximum(gap, out.get(name, 0.0)))  # nan stays
    return out


def memory(row: Merging, world: World) -> Errors:
    """Zero where no array of the program on a large site is a quarter of a dense delta or more."""
    n, width = world.weights.shape[0], 4096
    u, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, width, 4), (n, 4, width)))

    def f(bank: Deltas, w: Array) -> Deltas:
        return _merge(row, world._replace(weights=w), bank, w, jit=False)

    jaxpr = jax.make_jaxpr(f)({"x": LowRank(u, v)}, world.weights).jaxpr  # type: ignore[arg-type]
    return {"": 0.0 if 4 * max(_sizes(jaxpr)) < width * width else float("inf")}


def dtypes(row: Merging, world: World) -> Errors:
    """Adapters and factors kept in 16 bits, against the same numbers in float32."""
    half, exact = (_kept(world.bank, jnp.bfloat16, kind) for kind in (jnp.bfloat16, jnp.float32))
    factor = 0.7  # no number of 8 bits
    read = gather(_adapters(half, factor)).bank
    scaled = {p: LowRank(u, v * jnp.float32(factor)) for p, (u, v) in exact.items()}  # type: ignore[misc]
    out = _gap(_merge(row, world, read), _merge(row, world, scaled))
    half, exact = (_kept(world.bank, jnp.float16, kind) for kind in (jnp.float16, jnp.float32))
    made = _merge(row, world, half)
    gaps = _gap(made, _merge(row, world, exact))
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


def _moved(row: Merging, world: World) -> tuple[Any, dict[str, list[str]], Any]:
    """({group: (factors [N, S, ...], weights [N, S])}, {group: paths [S]}, key).

    Sites of one shape are slices of one group, whose program is compiled sooner; a merge of all
    sites at once is one group of one slice.
    """
    key = world.key if row.randomised else None
    if row.scope == "adapter":
        return {"": (world.bank, world.weights)}, {"": [""]}, key
    x, names = {}, {}
    for path, (u, v) in world.bank.items():  # type: ignore[misc]
        group, n = f"{u.shape[-2:]} {v.shape[-2:]}", u.shape[0]
        parts = [t.reshape(n, -1, *t.shape[-2:]) for t in (u, v)]
        w = jnp.broadcast_to(world.weights[:, None], parts[0].shape[:2])
        x.setdefault(group, []).append((LowRank(*parts), w))
        names.setdefault(group, []).extend([path] * w.shape[1])
    joined = {k: jax.tree.map(lambda *t: jnp.concatenate(t, 1), *every) for k, every in x.items()}
    return joined, names, key


def _rows(t: Any, paths: list[str]) -> np.ndarray:
    """[N, S, ...] as [S, elements]."""
    t = np.asarray(t)
    return t.reshape(1, -1) if len(paths) == 1 else np.moveaxis(t, 1, 0).reshape(len(paths), -1)


def _beside(low: Any, rng: np.random.Generator) -> Any:
    """Factors a way off, deltas of elements about 1: no kink where subspaces meet, as OFT's do."""
    if not isinstance(low, LowRank):
        return low
    u, v = (np.asarray(t) * (1 + rng.normal(size=t.shape) / 4) for t in low)
    u = u / np.sqrt(np.mean((u @ v) ** 2, axis=(-2, -1), keepdims=True))
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


def _static(row: Merging) -> tuple[Any, Any]:
    """What a program depends on, hashable, so that it is compiled once."""
    kind = (("function", row.function), ("scope", row.scope), ("loop", row.loop))
    return (*kind, ("randomised", row.randomised)), tuple(sorted(row.options.items()))


def _sines(x: Any, key: Any, kind: Any, options: Any) -> dict[str, Array]:
    """{group: [S], sums of sin of the merged deltas}."""
    row = Merging(name="", paper="", symbol="", evidence="", **dict(kind))
    every = row.scope == "adapter"
    bank, w = x[""] if every else ({k: t[i] for k, t in x.items()} for i in (0, 1))
    made = apply(row, bank, w, dict(options), key=key)
    found = {k: jnp.sum(jnp.sin(u @ v), (-2, -1)) for k, (u, v) in made.items()}  # type: ignore[misc]
    return {"": sum(map(jnp.sum, found.values()), jnp.zeros(()))[None]} if every else found


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slopes(x: Any, key: Any, kind: Any, options: Any) -> Any:
    """The gradient of the sum of `_sines`, like x."""

    def f(x: Any) -> Array:
        return sum(map(jnp.sum, _sines(x, key, kind, options).values()), jnp.zeros(()))

    return jax.grad(f)(x)


_values = jax.jit(_sines, static_argnums=(2, 3))


def _at(row: Merging, key: Any, x: Any, d: Any, part: int, step: float) -> dict[str, np.ndarray]:
    """`_sines` in float64 where factors (part 0) or weights (part 1) have moved by step d."""
    with jax.enable_x64(True):
        moved = {k: list(t) for k, t in x.items()}
        for k, t in moved.items():
            t[part] = jax.tree.map(lambda a, b: a + step * b, t[part], d[k][part])
        out = _values({k: tuple(t) for k, t in moved.items()}, key, *_static(row))
        return {k: np.asarray(f, np.float64) for k, f in out.items()}


def _merge(row, world, bank=None, weights=None, ids=None, jit=True) -> Deltas:
    bank = world.bank if bank is None else bank
    w = world.weights if weights is None else jnp.asarray(weights, world.weights.dtype)
    key = world.key if row.randomised else None
    ids = jnp.arange(w.shape[0], dtype=jnp.uint32) if ids is None else jnp.asarray(ids)
    return apply(row, bank, w, row.options, key=key, ids=ids if row.randomised else None, jit=jit)


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

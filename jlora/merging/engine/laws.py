"""The laws of merging, as errors: what `table.LAWS` says, measured on one bank.

Δ is the merged delta of a site, |.| the Frobenius norm over its slices:

.. math:: \\mathrm{error} = \\max_{\\text{sites}} |\\Delta_1 - \\Delta_2| \\, / \\, |\\text{inputs}|

The laws of derivatives are in `derivatives`, those of programs in `law_programs`.

`error(law, row, world)` is 0 where a law holds exactly, about the precision where it holds, and
not small where it is broken; infinite where something is not finite. Deltas are compared densely:
this is for tests on tiny banks.

Deviates: nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jlora import algebra
from jlora.algebra import Deltas, LowRank
from jlora.core.site import Site
from jlora.merging.engine.derivatives import difference, gradient
from jlora.merging.engine.inputs import gather, to_adapter
from jlora.merging.engine.law_programs import dtypes, jit, memory, sharded
from jlora.merging.engine.law_world import Errors, World, dense, first, gap, merged, take
from jlora.merging.engine.run import bound, checked
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic


def laws_of(row: Merging) -> list[str]:
    """The laws that a row can be asked for.

    Args:
      row: a merging method.

    Returns:
      Names of `CHECKS`.
    """
    return [law for law in CHECKS if law != "certificate" or row.certificate is not None]


def error(law: str, row: Merging, world: World) -> float:
    """The error of a law, relative to the norm of the bank, at the site where it is largest.

    Args and Raises are those of `errors`.

    Returns:
      0 where the law holds exactly.
    """
    return max(errors(law, row, world).values())


def errors(law: str, row: Merging, world: World) -> dict[str, float]:
    """The error of a law at every site, relative to the norm of the site's bank.

    Args:
      law: a name of `CHECKS`.
      row: the merging method; it is run with its own options.
      world: the inputs.

    Returns:
      {path: error}; a law that is no comparison of deltas has other names, such as "".

    Raises:
      ValueError: the law is "sharded" and the world has no mesh.
    """
    if row.size is not None:
        w = world.weights[: row.size]
        world = world._replace(bank=take(world.bank, slice(row.size)), weights=w / jnp.sum(w))
    got = CHECKS[law](row, world)
    inputs = dense({p: world.bank[p] for p in got if p in world.bank})
    size = {p: float(np.sqrt((d**2).sum())) for p, d in inputs.items()}
    gaps = {path: gap / size.get(path, 1.0) for path, gap in got.items()}
    return {path: gap if np.isfinite(gap) else float("inf") for path, gap in gaps.items()}


def weight_one(row: Merging, world: World) -> Errors:
    """One adapter of weight 1; where a method takes a fixed number, the others weigh 0.

    Args and Returns are those of `errors`.
    """
    if row.size is None:
        return gap(merged(row, world, take(world.bank, slice(1)), [1.0]), first(world.bank))
    w = [1.0] + [0.0] * (row.size - 1)
    return gap(merged(row, world, world.bank, w), first(world.bank))


def minus_one(row: Merging, world: World) -> Errors:
    """One adapter of weight -1 (the others of a fixed number weigh 0), against minus weight 1.

    Args and Returns are those of `errors`.
    """
    size = row.size or 1
    bank, w = take(world.bank, slice(size)), np.eye(size)[0]
    if not row.signed:
        return _refused(row, bank, -w)
    return gap(merged(row, world, bank, -w), algebra.scale(merged(row, world, bank, w), -1.0))


def signs(row: Merging, world: World) -> Errors:
    """Weights of both signs, against positive ones of adapters of both signs.

    Args and Returns are those of `errors`.
    """
    sign = np.where(np.arange(world.weights.shape[0]) % 2, -1.0, 1.0).astype(np.float32)
    if not row.signed:
        return _refused(row, world.bank, world.weights * sign)

    def turned(low: LowRank) -> LowRank:
        u = np.asarray(low.u) * sign.reshape(-1, *[1] * (low.u.ndim - 1))
        return LowRank(jnp.asarray(u), low.v)

    bank: Deltas = {p: turned(low) for p, low in world.bank.items()}  # type: ignore[arg-type]
    return gap(merged(row, world, weights=world.weights * sign), merged(row, world, bank))


def absent(row: Merging, world: World) -> Errors:
    """One adapter with others of weight 0, whatever those are; and all of weight 0, against 0.

    Args and Returns are those of `errors`.
    """
    n = world.weights.shape[0]
    nothing = dense(merged(row, world, weights=np.zeros(n)))
    out = {p: float(np.sqrt((d**2).sum())) for p, d in nothing.items()}
    others = jax.tree.map(_exchanged, world.bank)
    one = np.eye(n)[0]
    gaps = gap(merged(row, world, others, one), merged(row, world, weights=one))
    return {p: float(np.maximum(gap, out[p])) for p, gap in gaps.items()}


def _exchanged(t: jax.Array) -> np.ndarray:
    """[N, ...] of which the first is as it was, and the others are others."""
    out = np.array(t)
    out[1:] = out[1:][::-1] - out[:1] / 2
    return out


def bounded(row: Merging, world: World) -> Errors:
    """How far the norm is beyond 4 sums of norms, for weights whose sum nearly vanishes.

    The adapters are nearly equal, so that those which agree on a sign can be of opposite weights.

    Args and Returns are those of `errors`.
    """
    n = world.weights.shape[0]
    near: Deltas = {}
    for path, (u, v) in world.bank.items():  # type: ignore[misc]
        near[path] = LowRank(u[:1] + 0.05 * u, jnp.broadcast_to(v[:1], v.shape))
    w = np.array([1.0, -0.999, 1e-3, *[0.0] * n])[:n]
    if not row.signed:
        return _refused(row, world.bank, w)
    deltas, inputs = dense(merged(row, world, near, w)), dense(near)
    out = {}
    for path, d in deltas.items():
        size = np.sqrt((inputs[path] ** 2).reshape(n, -1).sum(1)).sum()
        out[path] = float(np.maximum(np.sqrt((d**2).sum()) - 4 * size, 0.0))  # nan stays
    return out


def bank(row: Merging, world: World) -> Errors:
    """Adapters in a list, against one Adapter whose arrays lead with an axis of them.

    Args and Returns are those of `errors`.
    """
    sites = []
    for path, (u, v) in world.bank.items():  # type: ignore[misc]
        shape, kinds = (*u.shape[1:-1], v.shape[-1]), "s" * (u.ndim - 3) + "io"
        sites.append(Site(path, shape, kinds, jnp.dtype("float32"), ("dot",)))
    many = [to_adapter(take(world.bank, k), sites) for k in range(world.weights.shape[0])]
    one, other = (gather(given, world.weights) for given in (to_adapter(world.bank, sites), many))
    return gap(
        merged(row, world, one.bank, one.weights), merged(row, world, other.bank, other.weights)
    )


def _refused(row: Merging, bank: Deltas, w: Dynamic) -> Errors:
    """Zero where the weights are refused by name, else infinite."""
    try:
        checked(row, bank, jnp.asarray(w, jnp.float32), jax.random.key(0), row.options)
    except ValueError as error:
        if str(error).startswith(f"{row.name}: weights: got "):
            return {"": 0.0}
    return {"": float("inf")}


def idempotent(row: Merging, world: World) -> Errors:
    """Equal adapters, weights that sum to 1.

    Args and Returns are those of `errors`.
    """
    same = jax.tree.map(lambda t: jnp.broadcast_to(t[:1], t.shape), world.bank)
    return gap(merged(row, world, same), first(world.bank))


def permutation(row: Merging, world: World) -> Errors:
    """The adapters in another order, with their weights and ids.

    Args and Returns are those of `errors`.
    """
    order = np.roll(np.arange(world.weights.shape[0]), 1)
    bank, w = take(world.bank, order), world.weights[order]
    ids = order.astype(np.uint32)
    return gap(merged(row, world, bank, w, ids=ids), merged(row, world))


def gauge(row: Merging, world: World) -> Errors:
    """(u G, G^-1 v), another G for each site, slice and adapter.

    Args and Returns are those of `errors`.
    """

    rng = np.random.default_rng(np.asarray(jax.random.key_data(world.key)))

    def turned(low: LowRank) -> LowRank:
        r = low.u.shape[-1]
        g, _ = np.linalg.qr(rng.normal(size=(*low.u.shape[:-2], r, r)))
        g = g * np.linspace(0.5, 2.0, r)
        u, v = np.asarray(low.u) @ g, np.linalg.inv(g) @ np.asarray(low.v)
        return LowRank(jnp.asarray(u, low.u.dtype), jnp.asarray(v, low.v.dtype))

    bank: Deltas = {p: turned(low) for p, low in world.bank.items()}  # type: ignore[arg-type]
    return gap(merged(row, world, bank), merged(row, world))


def certificate(row: Merging, world: World) -> Errors:
    """The excess of the true error over its bound; the difference where the bound is tight.

    Args and Returns are those of `errors`.
    """
    w = dense(algebra.combine(world.bank, world.weights))
    deltas = dense(merged(row, world))
    out = {}
    for path, limit in bound(row, world.bank, world.weights, row.options).items():
        true = np.sqrt(((w[path] - deltas[path]) ** 2).sum((-2, -1)))
        gap = true - np.asarray(limit, np.float64)
        out[path] = float((np.abs(gap) if row.tight else gap).max())
    return out


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

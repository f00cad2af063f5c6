"""The laws of the derivatives of a merge: finite, not zero, and what central differences say.

=====  ====================================================================
Δ      merged delta of a site
F(x)   sum of sin(Δ), x the weights or the factors of a site
g      gradient of F as jitted, float32
d, h   a random direction; a step, in float64
=====  ====================================================================

.. math:: \\langle g, d \\rangle = \\frac{F(x + h d) - F(x - h d)}{2 h}

Deviates: nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora.algebra import LowRank
from jlora.merging.engine.law_world import Errors, World
from jlora.merging.engine.run import apply
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic, Tree

STEP = 1e-7  # of central differences in float64: few elements are so near to a kink
SLACK = 10  # of gradients in float32, alongside deltas in float32


def gradient(row: Merging, world: World) -> Errors:
    """Zero where the gradient by weights and factors of each slice is finite and not all zero.

    Args:
      row: the merging method; it is run with its own options.
      world: the inputs.

    Returns:
      {"": 0 or infinity}.
    """
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

    Args:
      row: the merging method; it is run with its own options.
      world: the inputs.

    Returns:
      {"factors of PATH" and "weights of PATH": error}.
    """
    (x, names, key), rng = _moved(row, world), np.random.default_rng(12)
    x = jax.tree.map(lambda t: _spread(t, rng), x, is_leaf=lambda t: isinstance(t, LowRank))
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


def _moved(row: Merging, world: World) -> tuple[Tree, dict[str, list[str]], Dynamic]:
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


def _rows(t: Dynamic, paths: list[str]) -> np.ndarray:
    """[N, S, ...] as [S, elements]."""
    t = np.asarray(t)
    return t.reshape(1, -1) if len(paths) == 1 else np.moveaxis(t, 1, 0).reshape(len(paths), -1)


def _spread(low: Tree, rng: np.random.Generator) -> Tree:
    """Factors a way off, deltas of elements about 1: no kink where subspaces meet, as OFT's do."""
    if not isinstance(low, LowRank):
        return low
    u, v = (np.asarray(t) * (1 + rng.normal(size=t.shape) / 4) for t in low)
    u = u / np.sqrt(np.mean((u @ v) ** 2, axis=(-2, -1), keepdims=True))
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


def _static(row: Merging) -> tuple[Dynamic, Dynamic]:
    """What a program depends on, hashable, so that it is compiled once."""
    kind = (("function", row.function), ("scope", row.scope), ("loop", row.loop))
    return (*kind, ("randomised", row.randomised)), tuple(sorted(row.options.items()))


def _sines(x: Tree, key: Dynamic, kind: Dynamic, options: Dynamic) -> dict[str, Array]:
    """{group: [S], sums of sin of the merged deltas}."""
    row = Merging(name="", paper="", symbol="", evidence="", **dict(kind))
    every = row.scope == "adapter"
    bank, w = x[""] if every else ({k: t[i] for k, t in x.items()} for i in (0, 1))
    deltas = apply(row, bank, w, dict(options), key=key)
    sines = {k: jnp.sum(jnp.sin(u @ v), (-2, -1)) for k, (u, v) in deltas.items()}  # type: ignore[misc]
    return {"": sum(map(jnp.sum, sines.values()), jnp.zeros(()))[None]} if every else sines


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slopes(x: Tree, key: Dynamic, kind: Dynamic, options: Dynamic) -> Tree:
    """The gradient of the sum of `_sines`, like x."""

    def f(x: Tree) -> Array:
        return sum(map(jnp.sum, _sines(x, key, kind, options).values()), jnp.zeros(()))

    return jax.grad(f)(x)


_values = jax.jit(_sines, static_argnums=(2, 3))


def _at(
    row: Merging, key: Dynamic, x: Tree, d: Tree, part: int, step: float
) -> dict[str, np.ndarray]:
    """`_sines` in float64 where factors (part 0) or weights (part 1) have moved by step d."""
    with jax.enable_x64(True):
        moved = {k: list(t) for k, t in x.items()}
        for k, t in moved.items():
            t[part] = jax.tree.map(lambda a, b: a + step * b, t[part], d[k][part])
        out = _values({k: tuple(t) for k, t in moved.items()}, key, *_static(row))
        return {k: np.asarray(f, np.float64) for k, f in out.items()}

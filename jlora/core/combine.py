"""One value made from several weights: a sum, a concatenation, a stack, a product.

Side by side, the deltas keep their own ranks; the model's own matmul stays one:

.. math:: [W_1 + u_1 v_1,\\; W_2 + u_2 v_2] = [W_1, W_2]
   + [u_1, u_2] \\begin{pmatrix} v_1 & 0 \\\\ 0 & v_2 \\end{pmatrix}

Cost: the thin product has the sum of the ranks. Weights stacked alike (one method and shape) keep
their methods, which cost nothing more. A product of two weights merges the smaller one.

Reference: none; follows from linearity.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jlora.core import compat
from jlora.core.atoms import Atom
from jlora.core.grid import Grid, delta, reads_context, rebuilt
from jlora.core.lazy import Lazy
from jlora.core.scope import Scope
from jlora.core.site import Site
from jlora.core.stacks import alike, joint, stacked
from jlora.core.views import merged_where_exact
from jlora.types import Dynamic


def add(scope: Scope, eqn: Dynamic, a: Dynamic, b: Dynamic) -> list[Dynamic] | None:
    """The rule of a sum or difference of weights, or of a weight and an array of its shape.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    return combined(scope, eqn, (a, b), "add")


def concatenate(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic] | None:
    """The rule of laying side by side along rows, columns or a stack.

    What is not an adapted weight has a delta of zero.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    return combined(scope, eqn, values, "concatenate", eqn.params["dimension"])


def stack(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic] | None:
    """The rule of a new stack axis: every slice keeps its own adapter.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    axis = eqn.params["axis"]

    def expanded(v):
        shape = (*v.shape[:axis], 1, *v.shape[axis:])
        return v.opened().reshaped(shape) if isinstance(v, Lazy) else jnp.reshape(v, shape)

    return combined(scope, eqn, [expanded(v) for v in values], "concatenate", axis)


def combined(
    scope: Scope, eqn: Dynamic, values: Sequence[Dynamic], name: str, axis: int | None = None
) -> list[Dynamic] | None:
    """Weights and arrays added or laid side by side.

    Args:
      scope: of the trace.
      eqn: the operation.
      values: weights and arrays.
      name: of the view, as `jl.sites` prints it.
      axis: the existing axis along which they lie; None: they are added.

    Returns:
      [the one weight]; None: they have to be merged.
    """

    def run(arrays):
        if axis is None:
            return compat.bind(eqn, arrays)
        return [lax.concatenate([jnp.asarray(t) for t in arrays], axis)]

    shape = eqn.outvars[0].aval.shape
    if axis is None and any(isinstance(v, Lazy) and v.shape != shape for v in values):
        return None
    if scope.uses is not None:
        if not all(scope.is_fixed(v) for v in values):
            return None
        lazy = [v for v in values if isinstance(v, Lazy)]
        base = run([v.view() if isinstance(v, Lazy) else v for v in values])[0]
        return [together(lazy, base, name, range(len(shape)) if axis is None else (axis,))]
    values = [
        v if isinstance(v, Lazy) and v.method is not None and "i" in v.site.kinds
        else scope.dense(v, eqn)
        for v in values
    ]  # fmt: skip
    lazy = [v for v in values if isinstance(v, Lazy)]
    if axis is not None and len(lazy) == len(values):
        joined = stacked(lazy, axis)
        if joined is not None:
            return [joined]
    readers = [v for v in lazy if reads_context(scope, v)]
    if readers and any(v.method != readers[0].method for v in lazy):
        return None
    deltas = [delta(scope, v) if isinstance(v, Lazy) else v for v in values]
    if any(d is None for d in deltas):
        return None
    bases: list[Dynamic] = [
        v.view() if isinstance(d, Grid) else d for d, v in zip(deltas, values, strict=True)
    ]
    base = run(bases)[0]
    grids = _aligned(deltas)
    if grids is None:
        return None
    if all(g is None for g in grids):
        return [base]
    if axis is None and eqn.primitive.name == "sub" and grids[1] is not None:
        grids[1] = grids[1]._replace(v=-grids[1].v)
    grid = _sum(grids) if axis is None else _side_by_side(grids, bases, axis)
    first = lazy[0].replace(site=joint(lazy))
    return [rebuilt(scope, first, base, grid)]


def together(
    ws: Sequence[Lazy], base: Float[jax.Array, "*shape"], name: str, axes: Sequence[int] | range
) -> Lazy:
    """In the abstract walk: a value computed from several weights.

    Args:
      ws: the weights.
      base: the value.
      name: of the view, as `jl.sites` prints it.
      axes: that the view changed.

    Returns:
      A weight whose `leaves` are those of all `ws`, with their shares of the elements.
    """
    atoms, dims, swapped = [], [], [_swapped(ws[0], w) for w in ws]
    alike = [w for w, axes in zip(ws, swapped, strict=True) if not axes]
    for k in range(base.ndim):
        sources = tuple(dict.fromkeys(s for w in alike for s in w.sources(k)))
        if sources or base.shape[k] > 1:
            kinds = {w.atoms[a].kind for w in alike for a in w.dims[k]}
            dims.append((len(atoms),))
            atoms.append(Atom("s" if kinds == {"s"} else "?", base.shape[k], sources))
        else:
            dims.append(())
    changed = frozenset(s for k in axes for w in ws for s in w.sources(k))
    views = dict.fromkeys(view for w in ws for view in w.views)
    views |= dict.fromkeys(("transposed", axes) for axes in swapped if axes)
    leaves: dict[Site, float] = {}
    for w in ws:
        for site, share in w.leaves or ((w.site, 1.0),):
            share *= math.prod(w.shape) / base.size
            leaves[site] = min(leaves.get(site, 0.0) + share, 1.0)
    return ws[0].replace(
        base=base, casts=(), atoms=tuple(atoms), dims=tuple(dims),
        views=(*views, (name, changed)), leaves=tuple(leaves.items()),
    )  # fmt: skip


def _swapped(a: Lazy, b: Lazy) -> frozenset[tuple[str, int]]:
    """The axes of leaves that are each in the other's place in `b`, as in w + w.T."""
    pairs = [(set(a.sources(k)), set(b.sources(k))) for k in range(a.ndim)]
    other = [pair for pair in pairs if pair[0] != pair[1]]
    if len(other) != 2 or other[0] != other[1][::-1] or not (other[0][0] and other[0][1]):
        return frozenset()
    return frozenset(other[0][0] | other[0][1])


def unknown(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic] | None:
    """The rule of the abstract walk for other operations that keep a weight's shape and axes.

    A matmul that follows shows what the axes are, so that the weight can be named, or merged.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    shape = eqn.outvars[0].aval.shape
    ws = [v for v in values if isinstance(v, Lazy) and v.shape == shape]
    if not ws or len(eqn.outvars) != 1 or not all(scope.is_fixed(v) for v in values):
        return None
    rest = [v if any(v is w for w in ws) else scope.dense(v, eqn) for v in values]
    (base,) = compat.bind(eqn, [v.view() if isinstance(v, Lazy) else v for v in rest])
    return [together(ws, base, "!" + scope.place(eqn), range(len(shape)))]


def one_of(cases: Sequence[tuple[Dynamic, bool]], walk: bool) -> Dynamic:
    """What the outputs of branches, of which one is chosen, have in common, if they are weights.

    Args:
      cases: the output of each branch, and whether it is fixed.
      walk: whether this is the abstract walk.

    Returns:
      In the abstract walk a list of the weights, else the name and atoms of a weight that may be
      any
      of them; None: they are not all weights, or are not alike.
    """
    ws = [v for v, _ in cases if isinstance(v, Lazy)]
    if walk:
        return ws if ws and all(fixed for _, fixed in cases) else None
    adapted = all(w.method is not None and "i" in w.site.kinds for w in ws)
    if len(ws) < len(cases) or not adapted or not alike(ws, branches=True):
        return None
    atoms = tuple(a._replace(sources=()) for a in ws[0].atoms)
    return {"site": dataclasses.replace(joint(ws), group=""), "atoms": atoms}


def returned(scope: Scope, eqn: Dynamic, value: Dynamic, same: Dynamic) -> Dynamic:
    """What a branch returns for an output.

    Args:
      scope: of the branch.
      eqn: the branch.
      value: the output.
      same: what `one_of` found.

    Returns:
      A weight under the common name, or an array.
    """
    if not isinstance(value, Lazy):
        return value
    if scope.uses is not None:
        return value.view() if same else scope.dense(value, eqn)
    if same is not None:
        return value.replace(**same)
    dense = merged_where_exact(scope, eqn, value)
    return scope.dense(value, eqn) if dense is None else dense


def _aligned(deltas: Sequence[Dynamic]) -> list[Dynamic] | None:
    """The grids (None for arrays) with the same kinds of axes; None if they differ."""
    grids = [d if isinstance(d, Grid) else None for d in deltas]
    kinds = next((g.kinds for g in grids if g is not None), ())

    def fits(g):
        return all(not (a and b) or a == b for a, b in zip(g.kinds, kinds, strict=True))

    out = [g if g is None or fits(g) else g.swapped() for g in grids]
    return out if all(g is None or fits(g) for g in out) else None


def _sum(grids: Sequence[Grid | None]) -> Grid:
    present = [g for g in grids if g is not None]
    kinds = tuple(
        next((k for k in ks if k), "") for ks in zip(*(g.kinds for g in present), strict=True)
    )
    return Grid(kinds, _cat([g.u for g in present], -1), _cat([g.v for g in present], -1))


def _side_by_side(grids: Sequence[Grid | None], bases: Sequence[jax.Array], axis: int) -> Grid:
    """Each delta in its own part of the axis: with its own ranks, or as slices of a stack."""
    present = [g for g in grids if g is not None]
    kind = next((g.kinds[axis] for g in present if g.kinds[axis]), "s")
    sizes = [t.shape[axis] for t in bases]
    if kind != "s":
        ends = [(sum(sizes[:k]), sum(sizes[k + 1 :])) for k in range(len(sizes))]
        placed = [
            None if g is None else g.along(axis, functools.partial(_padded, by=by))
            for g, by in zip(grids, ends, strict=True)
        ]
        return _sum(placed)
    rank, like = max(g.u.shape[-1] for g in present), present[0]

    def slices(part):
        def one(g, n):
            t = (g or like)[part]
            t = jnp.zeros((*t.shape[:axis], n, *t.shape[axis + 1 :]), t.dtype) if g is None else t
            return _padded(t, t.ndim - 1, (0, rank - t.shape[-1]))

        return _cat([one(g, n) for g, n in zip(grids, sizes, strict=True)], axis)

    kinds = (*like.kinds[:axis], "s", *like.kinds[axis + 1 :])
    return Grid(kinds, slices(1), slices(2))


def _padded(t: jax.Array, axis: int, by: tuple[int, int]) -> jax.Array:
    return jnp.pad(t, [by if k == axis else (0, 0) for k in range(t.ndim)])


def _cat(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    dtype = functools.reduce(jnp.promote_types, (t.dtype for t in arrays))
    return jnp.concatenate([t.astype(dtype) for t in arrays], axis)


def product(scope: Scope, eqn: Dynamic, lhs: Lazy, rhs: Lazy) -> tuple[Dynamic, Dynamic] | None:
    """Two weights multiplied: the smaller one is merged.

    Args:
      scope: of the trace.
      eqn: the matmul.
      lhs: a weight.
      rhs: a weight.

    Returns:
      The operands, one of them dense; None: the smaller one cannot be merged.
    """
    if scope.uses is not None:
        (lc, _), (lb, _) = eqn.params["dimension_numbers"]
        free = [k for k in range(lhs.ndim) if k not in (*lc, *lb)]
        scope.note(lhs, "product", {"i": free, "s": lb}, 0)
        return lhs.view(), rhs
    left = lhs.view().size <= rhs.view().size
    small = merged_where_exact(scope, eqn, lhs if left else rhs)
    if small is None:
        return None
    return (small, rhs) if left else (lhs, small)

"""Linear views of one weight: slices, scalings, pads, flips, copies along an axis.

The model's own operation runs on what the model sees of the base, as it would without an adapter;
the thin product runs on the part of u and v that is in view (`grid`). The gradient is exact: the
maps are the model's own, applied to u and v.

Cost: a method without factors (DoRA, OFT, HiRA, ...) merges the whole weight where the view is
taken, so a dense weight, and in the backward pass its dense gradient, exist there. Stacks are cut
without that.

Reference: none; follows from linearity.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.core import compat
from jlora.core.evaluate import evaluate
from jlora.core.grid import Grid, delta, reads_context, rebuilt
from jlora.core.lazy import Atom, Lazy


def seen(w: Lazy, base: jax.Array, name: str, axes: Sequence[int]) -> Lazy:
    """In the abstract walk: `w` after a view that changed `axes`, of which `base` is the value."""
    atoms, dims = [], []
    for axis, dim in enumerate(w.dims):
        whole = axis not in axes and len(dim) == 1
        kinds = {w.atoms[a].kind for a in dim}
        if dim or base.shape[axis] > 1:
            kind = "s" if kinds == {"s"} else "?"
            old = w.atoms[dim[0]] if whole else Atom(kind, base.shape[axis], w.sources(axis))
            dims.append((len(atoms),))
            atoms.append(old)
        else:
            dims.append(())
    changed = frozenset(s for k in axes for s in w.sources(k))
    views = (*w.views, (name, changed))
    return w.replace(base=base, casts=(), atoms=tuple(atoms), dims=tuple(dims), views=views)


Moves = dict[int, Callable[[jax.Array, int], jax.Array]]  # by axis: what happens along it


def view(
    scope: Any, w: Lazy, name: str, run: Callable[[jax.Array], Sequence[Any]], parts: list[Moves]
) -> list[Any] | None:
    """A linear view along axes; `run` makes all parts of the dense weight, `parts` of the delta."""
    axes = sorted({k for moves in parts for k in moves})
    if scope.uses is not None:
        return [seen(w, base, name, axes) for base in run(w.view())]
    found = delta(scope, w)
    if not isinstance(found, Grid):
        return None if found is None else list(run(found))
    out = []
    for base, moves in zip(run(w.view()), parts, strict=True):
        grid = functools.reduce(lambda g, kv: g.along(*kv), moves.items(), found)
        out.append(rebuilt(scope, w, base, grid))
    return out


def along(moves: Moves) -> Callable[[jax.Array], list[jax.Array]]:
    return lambda t: [functools.reduce(lambda t, kv: kv[1](t, kv[0]), moves.items(), t)]


def part(scope: Any, w: Lazy, moves: Moves) -> list[Any] | None:
    """A slice along each axis of `moves`: of stacks without touching the method, else a view."""
    rest: Moves = {}
    for axis, move in moves.items():
        cut = w.cut(axis, move)
        if cut is None or (scope.uses is not None and len(w.dims[axis]) > 1):
            rest[axis] = move
        else:
            sources = frozenset(w.sources(axis))
            w = cut.replace(views=(*w.views, ("slice", sources))) if scope.uses is not None else cut
    return view(scope, w, "slice", along(rest), [rest]) if rest else [w]


def slice_(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    p = eqn.params
    cuts = zip(p["start_indices"], p["limit_indices"], p["strides"] or (1,) * w.ndim, strict=True)
    return part(
        scope,
        w,
        {
            axis: lambda t, k, c=cut: lax.slice_in_dim(t, *c, axis=k)
            for axis, cut in enumerate(cuts)
            if cut != (0, w.shape[axis], 1)
        },
    )


def dynamic_slice(scope: Any, eqn: Any, w: Any, *starts: Any) -> list[Any] | None:
    if not isinstance(w, Lazy) or any(isinstance(s, Lazy) for s in starts):
        return None
    return part(
        scope,
        w,
        {
            axis: lambda t, k, i=starts[axis], n=size: lax.dynamic_slice_in_dim(t, i, n, axis=k)
            for axis, size in enumerate(eqn.params["slice_sizes"])
            if size != w.shape[axis]
        },
    )


def split(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    axis, start, moves = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        cut = (int(start), int(start + size))
        moves.append(lambda t, k, c=cut: lax.slice_in_dim(t, *c, axis=k))
        start += size
    if w.stacks(axis):
        parts = [part(scope, w, {axis: move}) for move in moves]
        return None if any(p is None for p in parts) else [p[0] for p in parts if p]
    return view(
        scope, w, "slice", lambda t: [m(t, axis) for m in moves], [{axis: m} for m in moves]
    )


def unstack(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    axis, out = eqn.params["axis"], []
    for i in range(w.shape[axis]):
        move = functools.partial(lax.slice_in_dim, start_index=i, limit_index=i + 1)
        cut = part(scope, w, {axis: lambda t, k, move=move: move(t, axis=k)})
        if cut is None:
            return None
        (v,) = cut
        out.append(v.squeezed((axis,)) if isinstance(v, Lazy) else lax.squeeze(v, (axis,)))
    return out


def pad(scope: Any, eqn: Any, w: Any, value: Any) -> list[Any] | None:
    if not isinstance(w, Lazy) or isinstance(value, Lazy):
        return None

    def move(t, axis, by):
        config = [(0, 0, 0)] * t.ndim
        config[axis] = by
        return lax.pad(t, jnp.zeros((), t.dtype), config)

    config = {k: c for k, c in enumerate(eqn.params["padding_config"]) if tuple(c) != (0, 0, 0)}
    moves: Moves = {k: functools.partial(move, by=tuple(map(int, c))) for k, c in config.items()}
    return view(scope, w, "pad", lambda t: compat.bind(eqn, (t, value)), [moves])


def reverse(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    moves: Moves = {k: lambda t, axis: lax.rev(t, (axis,)) for k in eqn.params["dimensions"]}
    return view(scope, w, "flip", along(moves), [moves])


def tile(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    moves: Moves = {
        k: lambda t, axis, n=n: jnp.concatenate([t] * n, axis)
        for k, n in enumerate(eqn.params["reps"])
        if n > 1
    }
    return view(scope, w, "tile", lambda t: compat.bind(eqn, (t,)), [moves])


def broadcast(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    """New axes: of size one, or one slice of a stack that is the same in all."""
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if tuple(sorted(kept)) != tuple(kept):
        return None
    out = w.opened().reshaped(
        [w.shape[kept.index(k)] if k in kept else 1 for k in range(len(shape))]
    )
    if out is None:
        return None
    new = {k: n for k, n in enumerate(shape) if n != out.shape[k]}
    if not new:
        return [out]
    if any(out.dims[k] for k in new):
        return None
    moves: Moves = {
        k: lambda t, axis, n=n: jnp.broadcast_to(t, (*t.shape[:axis], n, *t.shape[axis + 1 :]))
        for k, n in new.items()
    }
    made = view(scope, out, "broadcast", along(moves), [moves])
    return made and [_marked(v, new) if isinstance(v, Lazy) else v for v in made]


def _marked(w: Lazy, axes: Iterable[int]) -> Lazy:
    copied = {a for k in axes for a in w.dims[k]}
    atoms = (t._replace(copies=True) if a in copied else t for a, t in enumerate(w.atoms))
    return w.replace(atoms=tuple(atoms))


def reshape(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    sizes, order = eqn.params["new_sizes"], eqn.params.get("dimensions") or range(w.ndim)
    w = w.opened()
    w = w.replace(base=lax.transpose(w.base, tuple(order)), dims=tuple(w.dims[k] for k in order))
    out = w.reshaped(sizes)
    if out is not None and scope.uses is None and len(out.atoms) == len(w.atoms):
        out = _repeated(scope, w, out).reshaped(sizes)
    return None if out is None else [out]


def _repeated(scope: Any, w: Lazy, out: Lazy) -> Lazy:
    """`w` with the copies that `out` lays along rows or columns turned into such (`jnp.repeat`)."""
    become = {}
    for dim in out.dims:
        kinds = {w.atoms[a].kind for a in dim if w.atoms[a].size > 1} - {"s"}
        for a in dim:
            if len(kinds) == 1 and w.atoms[a].copies:
                become[a] = next(iter(kinds))
    axes = {k: become[dim[0]] for k, dim in enumerate(w.dims) if len(dim) == 1 and dim[0] in become}
    found = delta(scope, w) if axes else None
    if not isinstance(found, Grid):
        return w
    for k, kind in axes.items():
        u, v = (lax.slice_in_dim(t, 0, 1, axis=k) for t in (found.u, found.v))
        kinds = (*found.kinds[:k], kind, *found.kinds[k + 1 :])
        n = w.shape[k]
        found = Grid(kinds, u, v).along(k, lambda t, k, n=n: jnp.repeat(t, n, axis=k))
    return rebuilt(scope, w, w.view(), found)


def negative(scope: Any, eqn: Any, w: Lazy) -> list[Any] | None:
    return _scaled(scope, w, lambda t: compat.bind(eqn, (t,)), jnp.asarray(-1, w.dtype))


def multiply(scope: Any, eqn: Any, a: Any, b: Any) -> list[Any] | None:
    """A weight times a number, or times one number for each row, column or slice."""
    shape = eqn.outvars[0].aval.shape
    whole = [isinstance(v, Lazy) and v.shape == shape for v in (a, b)]
    if whole[0] == whole[1]:
        return None
    left = whole[0]
    w, by = (a, b) if left else (b, a)
    by = jnp.asarray(scope.dense(by, eqn))
    return _scaled(scope, w, lambda t: compat.bind(eqn, (t, by) if left else (by, t)), by)


def divide(scope: Any, eqn: Any, w: Any, by: Any) -> list[Any] | None:
    """A weight over a number, or over one number for each row, column or slice."""
    if not isinstance(w, Lazy) or w is by or w.shape != eqn.outvars[0].aval.shape:
        return None
    by = jnp.asarray(scope.dense(by, eqn))
    return _scaled(scope, w, lambda t: compat.bind(eqn, (t, by)), 1 / by)


def _scaled(scope: Any, w: Lazy, run: Callable, by: jax.Array) -> list[Any] | None:
    axes = [k for k, n in enumerate(by.shape) if n > 1]
    if scope.uses is not None:
        every = [k for k, n in enumerate(w.shape) if n > 1]
        if axes and axes == every:
            return None
        name = "gain" if axes else "scale"
        return [_scale_seen(w, base, name, axes or every) for base in run(w.view())]
    found = delta(scope, w)
    if not isinstance(found, Grid):
        return None if found is None else run(found)
    kinds = {found.kinds[k] for k in axes} - {"s", ""}
    if len(kinds) > 1:
        return None
    by = by[..., None] if by.ndim else by
    if kinds == {"o"}:
        grid = found._replace(v=found.v * by.astype(found.v.dtype))
    else:
        grid = found._replace(u=found.u * by.astype(found.u.dtype))
    return [rebuilt(scope, w, base, grid) for base in run(w.view())]


def _scale_seen(w: Lazy, base: jax.Array, name: str, axes: Sequence[int]) -> Lazy:
    changed = frozenset(s for k in axes for s in w.sources(k))
    return w.replace(base=base, casts=(), views=(*w.views, (name, changed)))


def identity(scope: Any, eqn: Any, *values: Any) -> list[Any] | None:
    """A function with a gradient of its own that returns what it is given: merged, as that asks."""
    inner, _ = compat.opened(compat.called(eqn))
    places = {id(v): k for k, v in enumerate(inner.invars)}
    if inner.eqns or any(id(v) not in places for v in inner.outvars):
        return _looked_through(scope, eqn, values) if scope.uses is not None else None
    if scope.uses is not None:
        out = [values[places[id(v)]] for v in inner.outvars]
        name = eqn.primitive.name.removesuffix("_call")
        return [seen(v, v.view(), name, range(v.ndim)) if isinstance(v, Lazy) else v for v in out]
    dense = [merged_where_exact(scope, eqn, v) if isinstance(v, Lazy) else v for v in values]
    return None if any(v is None for v in dense) else compat.bind(eqn, dense)


def _looked_through(scope: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """In the abstract walk: what a function with a gradient of its own does with weights.

    It needs them merged; the matmuls in it tell their axes.
    """
    mark = ("!" + scope.place(eqn), frozenset())
    inside = [
        v.replace(base=v.view(), casts=(), views=(*v.views, mark)) if isinstance(v, Lazy) else v
        for v in values
    ]
    return evaluate(scope.inside(eqn), compat.called(eqn), inside)


def merged_where_exact(scope: Any, eqn: Any, w: Lazy) -> jax.Array | None:
    """The merged weight, where `apply` is no more than x @ merge(w, p)."""
    if w.method is None or "i" not in w.site.kinds:
        return scope.dense(w, eqn)
    return w.merged() if w.method.merges and not reads_context(scope, w) else None

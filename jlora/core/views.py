"""Linear views of one weight: slices, pads, flips, copies along an axis.

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

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jlora.core import compat
from jlora.core.atoms import Atom
from jlora.core.evaluate import evaluate
from jlora.core.grid import Grid, delta, reads_context, rebuilt
from jlora.core.lazy import Lazy
from jlora.core.scope import Scope
from jlora.types import Dynamic


def seen(w: Lazy, base: Float[jax.Array, "*shape"], name: str, axes: Sequence[int]) -> Lazy:
    """In the abstract walk: a weight after a view.

    Args:
      w: the weight before.
      base: the value of the view.
      name: of the view, as `jl.sites` prints it.
      axes: that the view changed.

    Returns:
      The weight after; kinds of the changed axes are unknown unless they are of a stack.
    """
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
    scope: Scope, w: Lazy, name: str, run: Callable, parts: list[Moves]
) -> list[Dynamic] | None:
    """A linear view along axes.

    Args:
      scope: of the trace.
      w: the weight.
      name: of the view, as `jl.sites` prints it.
      run: dense weight -> all outputs of the view.
      parts: of each output, what happens to the delta along each axis.

    Returns:
      One weight per output; None: the weight has to be merged.
    """
    axes = sorted({k for moves in parts for k in moves})
    if scope.uses is not None:
        return [seen(w, base, name, axes) for base in run(w.view())]
    low_rank = delta(scope, w)
    if not isinstance(low_rank, Grid):
        return None if low_rank is None else list(run(low_rank))
    out = []
    for base, moves in zip(run(w.view()), parts, strict=True):
        grid = functools.reduce(lambda g, kv: g.along(*kv), moves.items(), low_rank)
        out.append(rebuilt(scope, w, base, grid))
    return out


def along(moves: Moves) -> Callable[[jax.Array], list[jax.Array]]:
    """Moves along several axes, one after the other.

    Args:
      moves: by axis.

    Returns:
      A function from an array to a list of the one result.
    """
    return lambda t: [functools.reduce(lambda t, kv: kv[1](t, kv[0]), moves.items(), t)]


def part(scope: Scope, w: Lazy, moves: Moves) -> list[Dynamic] | None:
    """A slice along each axis of `moves`: of stacks without touching the method, else a view.

    Args:
      scope: of the trace.
      w: the weight.
      moves: by axis: what slices it.

    Returns:
      [the slice]; None: the weight has to be merged.
    """
    rest: Moves = {}
    for axis, move in moves.items():
        cut = w.cut(axis, move)
        if cut is None or (scope.uses is not None and len(w.dims[axis]) > 1):
            rest[axis] = move
        else:
            sources = frozenset(w.sources(axis))
            w = cut.replace(views=(*w.views, ("slice", sources))) if scope.uses is not None else cut
    return view(scope, w, "slice", along(rest), [rest]) if rest else [w]


def slice_(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of a slice with constant bounds.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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


def dynamic_slice(scope: Scope, eqn: Dynamic, w: Dynamic, *starts: Dynamic) -> list[Dynamic] | None:
    """The rule of a slice of constant size with computed starts.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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


def split(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of a split into parts along one axis.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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


def unstack(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of taking apart along one axis.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    axis, out = eqn.params["axis"], []
    for i in range(w.shape[axis]):
        move = functools.partial(lax.slice_in_dim, start_index=i, limit_index=i + 1)
        cut = part(scope, w, {axis: lambda t, k, move=move: move(t, axis=k)})
        if cut is None:
            return None
        (v,) = cut
        out.append(v.squeezed((axis,)) if isinstance(v, Lazy) else lax.squeeze(v, (axis,)))
    return out


def pad(scope: Scope, eqn: Dynamic, w: Dynamic, value: Dynamic) -> list[Dynamic] | None:
    """The rule of padding, the interior kind included; what is padded has a delta of zero.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    if not isinstance(w, Lazy) or isinstance(value, Lazy):
        return None

    def move(t, axis, by):
        config = [(0, 0, 0)] * t.ndim
        config[axis] = by
        return lax.pad(t, jnp.zeros((), t.dtype), config)

    config = {k: c for k, c in enumerate(eqn.params["padding_config"]) if tuple(c) != (0, 0, 0)}
    moves: Moves = {k: functools.partial(move, by=tuple(map(int, c))) for k, c in config.items()}
    return view(scope, w, "pad", lambda t: compat.bind(eqn, (t, value)), [moves])


def reverse(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of a flip.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    moves: Moves = {k: lambda t, axis: lax.rev(t, (axis,)) for k in eqn.params["dimensions"]}
    return view(scope, w, "flip", along(moves), [moves])


def tile(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of copies laid side by side along axes.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    moves: Moves = {
        k: lambda t, axis, n=n: jnp.concatenate([t] * n, axis)
        for k, n in enumerate(eqn.params["reps"])
        if n > 1
    }
    return view(scope, w, "tile", lambda t: compat.bind(eqn, (t,)), [moves])


def broadcast(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of new axes: of size one, or one slice of a stack that is the same in all.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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
    copies = view(scope, out, "broadcast", along(moves), [moves])
    return copies and [_marked(v, new) if isinstance(v, Lazy) else v for v in copies]


def _marked(w: Lazy, axes: Iterable[int]) -> Lazy:
    copied = {a for k in axes for a in w.dims[k]}
    atoms = (t._replace(copies=True) if a in copied else t for a, t in enumerate(w.atoms))
    return w.replace(atoms=tuple(atoms))


def reshape(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of a reshape that splits or joins axes.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    sizes, order = eqn.params["new_sizes"], eqn.params.get("dimensions") or range(w.ndim)
    w = w.opened()
    w = w.replace(base=lax.transpose(w.base, tuple(order)), dims=tuple(w.dims[k] for k in order))
    out = w.reshaped(sizes)
    if out is not None and scope.uses is None and len(out.atoms) == len(w.atoms):
        out = _repeated(scope, w, out).reshaped(sizes)
    return None if out is None else [out]


def _repeated(scope: Scope, w: Lazy, out: Lazy) -> Lazy:
    """`w` with the copies that `out` lays along rows or columns turned into such (`jnp.repeat`)."""
    become = {}
    for dim in out.dims:
        kinds = {w.atoms[a].kind for a in dim if w.atoms[a].size > 1} - {"s"}
        for a in dim:
            if len(kinds) == 1 and w.atoms[a].copies:
                become[a] = next(iter(kinds))
    axes = {k: become[dim[0]] for k, dim in enumerate(w.dims) if len(dim) == 1 and dim[0] in become}
    low_rank = delta(scope, w) if axes else None
    if not isinstance(low_rank, Grid):
        return w
    for k, kind in axes.items():
        u, v = (lax.slice_in_dim(t, 0, 1, axis=k) for t in (low_rank.u, low_rank.v))
        kinds = (*low_rank.kinds[:k], kind, *low_rank.kinds[k + 1 :])
        n = w.shape[k]
        low_rank = Grid(kinds, u, v).along(k, lambda t, k, n=n: jnp.repeat(t, n, axis=k))
    return rebuilt(scope, w, w.view(), low_rank)


def identity(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic] | None:
    """The rule of a function with a gradient of its own that returns what it is given.

    Its gradient asks for the dense one, so the weight is merged where that is exact.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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


def _looked_through(scope: Scope, eqn: Dynamic, values: Sequence[Dynamic]) -> list[Dynamic]:
    """In the abstract walk: what a function with a gradient of its own does with weights.

    It needs them merged; the matmuls in it show their axes.
    """
    mark = ("!" + scope.place(eqn), frozenset())
    inside = [
        v.replace(base=v.view(), casts=(), views=(*v.views, mark)) if isinstance(v, Lazy) else v
        for v in values
    ]
    return evaluate(scope.inside(eqn), compat.called(eqn), inside)


def merged_where_exact(scope: Scope, eqn: Dynamic, w: Lazy) -> jax.Array | None:
    """The merged weight, where `apply` is no more than x @ merge(w, p).

    Args:
      scope: of the trace.
      eqn: the operation that needs it.
      w: the weight.

    Returns:
      [*shape]; None: the method reads `ctx`, reports, or its delta depends on x.
    """
    if w.method is None or "i" not in w.site.kinds:
        return scope.dense(w, eqn)
    return w.merged() if w.method.merges and not reads_context(scope, w) else None

"""Where a lazy weight is used up: matmul, convolution and table lookup.

Each hands the method an `x` whose last axis is d_in (or something that stands for it) and a `w`
that runs the model's own operation, and puts the answer back into the model's layout.

Source: our reading.
Deviates: none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.core import compat
from jlora.core.adapter import low_rank, wide
from jlora.core.lazy import Lazy, merged


class Weight:
    """The `w` of `Method.apply`: `x @ w` is the model's own operation on the base weight."""

    def __init__(self, lazy: Lazy, own: Callable | None, x: Any, precision: Any = None):
        self._lazy, self._own, self._x, self._precision = lazy, own, x, precision
        self.shape = (lazy.site.d_in, lazy.site.d_out)
        self.dtype = lazy.dtype

    def __rmatmul__(self, x: Any) -> jax.Array:
        if self._own is not None and x.shape == self._x.shape:
            return self._own(x if isinstance(x, Operand) else x.astype(self._x.dtype))
        return jnp.matmul(x, self._lazy.matrix().astype(x.dtype), precision=self._precision)

    def dense(self) -> jax.Array:
        """The base matrix [d_in, d_out], in at least float32."""
        m = self._lazy.matrix()
        return m.astype(wide(m.dtype))

    def merged(self, method: Any, p: Mapping[str, jax.Array]) -> jax.Array:
        """merge(w, p) [d_in, d_out] in the dtype that the model multiplies with."""
        return self._lazy.cast(merged(method, self._lazy.matrix(), dict(p), {}, 0))


class Operand:
    """Stands for an x [..., d_in] too large to write down; `x @ m` is cheap, the rest is not."""

    shape: tuple[int, ...]
    dtype: Any

    def __init__(self, times: Callable, own: Callable, shape: Sequence[int], dtype: Any):
        self._times, self._own, self.shape, self.dtype = times, own, tuple(shape), dtype

    def __matmul__(self, m: Any) -> jax.Array:
        return m.__rmatmul__(self) if isinstance(m, Weight) else self._times(m)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def own(self) -> jax.Array:
        return self._own()

    def map(self, fn: Callable) -> "Operand":
        """`fn` (elementwise, keeps zero) on what it was made from."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """x itself, [..., d_in]."""
        return self._times(jnp.eye(self.shape[-1], dtype=self.dtype))

    def __jax_array__(self) -> jax.Array:
        return self.dense()


class Join:
    """Several axes, each of some atoms, as the one axis of the matrix that they make up."""

    def __init__(self, w: Lazy, axes: Sequence[int]):
        self.atoms = [a for k in axes for a in w.dims[k]]
        self.shape = [w.shape[k] for k in axes]
        self._sizes = [w.atoms[a].size for a in self.atoms]
        self._sorted = self.atoms == sorted(self.atoms)

    def join(self, x: jax.Array) -> jax.Array:
        """[..., *shape] -> [..., d]."""
        lead = x.shape[: x.ndim - len(self.shape)]
        if not self._sorted:
            n = len(lead)
            x = x.reshape(*lead, *self._sizes)
            x = jnp.transpose(x, [*range(n), *(n + k for k in np.argsort(self.atoms))])
        return x.reshape(*lead, math.prod(self._sizes))

    def split(self, y: jax.Array) -> jax.Array:
        """[..., d] -> [..., *shape]."""
        lead = y.shape[:-1]
        if not self._sorted:
            n, order = len(lead), np.argsort(self.atoms)
            y = y.reshape(*lead, *(self._sizes[k] for k in order))
            y = jnp.transpose(y, [*range(n), *(n + int(k) for k in np.argsort(order))])
        return y.reshape(*lead, *self.shape)


def applied(scope: Any, w: Lazy, x: Any, own: Callable, precision: Any = None) -> jax.Array:
    """The method on x [..., d_in]; notes what it reports."""
    assert w.method is not None
    ctx = scope.enter(w.site)
    handle = Weight(w, own, x, precision)
    y = w.method.apply(x, handle, {**w.shared, **w.own}, ctx)
    if isinstance(y, tuple):
        y, report = y
        scope.report(w.site.path, report)
    return y


def applied_transposed(scope: Any, w: Lazy, x: jax.Array, own: Callable) -> jax.Array:
    """x [..., d_out] @ merge(w, p).T, for weights used both ways (tied embeddings)."""
    assert w.method is not None
    p = {**w.shared, **w.own}
    uv = w.method.factors(p)
    if uv is not None:
        y = own(x)
        return y + low_rank(x, uv[1].T, uv[0].T).astype(y.dtype)
    ctx = scope.enter(w.site)
    like = jax.ShapeDtypeStruct((*x.shape[:-1], w.site.d_in), x.dtype)

    def forward(z):
        y = w.method.apply(z, Weight(w, None, z), p, ctx)
        return (y[0] if isinstance(y, tuple) else y).astype(x.dtype)

    return jax.linear_transpose(forward, like)(x)[0]


def dot_general(scope: Any, eqn: Any, lhs: Any, rhs: Any) -> list[Any] | None:
    """The rule of a matmul: either operand, any axes, weight axes in any order."""
    if isinstance(lhs, Lazy) and isinstance(rhs, Lazy):
        return None
    left = isinstance(lhs, Lazy)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    w, x, wx = (lhs, rhs, (lc, rc, lb, rb)) if left else (rhs, lhs, (rc, lc, rb, lb))
    if scope.uses is not None:
        wc, _, wb, _ = wx
        size = math.prod(eqn.outvars[0].aval.shape) * math.prod(w.shape[k] for k in wc)
        scope.note(w, "dot", {"i": wc, "s": wb}, 2 * size)
        return compat.bind(eqn, (w.view(), x) if left else (x, w.view()))
    if w.method is None:
        return None
    options = {k: v for k, v in eqn.params.items() if k != "dimension_numbers" and v is not None}
    y = _product(scope, w, x, wx, left, options)
    return None if y is None else [y.astype(eqn.outvars[0].aval.dtype)]


def _product(scope, w, x, dims, left, options):
    wc, xc, wb, xb = dims
    if wb:  # one stack axis less, mapped
        peeled = w.peel(wb[0])
        if peeled is None:
            return None
        arrays, rebuild = peeled
        less = (_less(wc, wb[0]), _less(xc, xb[0]), _less(wb[1:], wb[0]), _less(xb[1:], xb[0]))
        template = scope.fork()

        def one(arrays, x, i):
            child = template.child(i)
            return _product(child, rebuild(arrays), x, less, left, options), child.aux

        steps = jnp.arange(w.shape[wb[0]], dtype=jnp.int32)
        y, aux = jax.vmap(one, in_axes=(0, xb[0], 0))(arrays, x, steps)
        scope.join(template, aux)
        return y
    wf = [k for k in range(w.ndim) if k not in wc]
    xf = [k for k in range(x.ndim) if k not in xc]
    con, out = Join(w, wc), Join(w, wf)
    if sorted(con.atoms) == w.of("i") and sorted(out.atoms) == w.of("o"):
        apply = applied
    elif sorted(con.atoms) == w.of("o") and sorted(out.atoms) == w.of("i"):
        apply = applied_transposed
    else:
        return None
    order = [*xf, *xc]
    back = [int(k) for k in np.argsort(order)]
    n = len(wf)

    def own(x2):
        x1 = _transpose(con.split(x2), back)
        args = (w.view(), x1) if left else (x1, w.view())
        numbers = ((wc, xc) if left else (xc, wc), ((), ()))
        y = lax.dot_general(*args, numbers, **options)
        return out.join(_transpose(y, [*range(n, y.ndim), *range(n)]) if left else y)

    y = out.split(apply(scope, w, con.join(_transpose(x, order)), own))
    return _transpose(y, [*range(y.ndim - n, y.ndim), *range(y.ndim - n)]) if left else y


def _less(axes: Sequence[int], gone: int) -> tuple[int, ...]:
    return tuple(k - (k > gone) for k in axes)


def _transpose(x: jax.Array, order: Sequence[int]) -> jax.Array:
    return x if list(order) == sorted(order) else jnp.transpose(x, order)


class Rows(Operand):
    """One-hot rows: `ids` look up along the in axis; mode and fill as the model's own lookup."""

    def __init__(self, ids, own, shape, dtype, options, gain=None):
        self._ids, self._options, self._gain = ids, options, gain

        def weighed(y):
            return y if gain is None else y * gain.astype(y.dtype)

        def times(m):
            numbers = lax.GatherDimensionNumbers((ids.ndim - 1,), (0,), (0,))
            y = lax.gather(m, ids, numbers, (1, m.shape[1]), **options)
            return weighed(y)

        super().__init__(times, lambda: weighed(own()), shape, dtype)
        self._bare = own

    def map(self, fn: Callable) -> "Rows":
        ones = jnp.ones((*self.shape[:-1], 1), self.dtype)
        gain = fn(ones if self._gain is None else self._gain)
        return Rows(self._ids, self._bare, self.shape, self.dtype, self._options, gain)


def gather(scope: Any, eqn: Any, w: Any, ids: Any) -> list[Any] | None:
    """The rule of a lookup along one axis: of a table's rows, or of slices of a stack."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    if not isinstance(w, Lazy) or isinstance(ids, Lazy):
        return None
    axes = numbers.collapsed_slice_dims
    whole = all(p["slice_sizes"][k] == w.shape[k] for k in range(w.ndim) if k not in axes)
    if len(axes) != 1 or axes != numbers.start_index_map or not whole or len(w.dims[axes[0]]) != 1:
        return None
    if numbers.operand_batching_dims:
        return None
    axis, kind = axes[0], w.atoms[w.dims[axes[0]][0]].kind
    if kind == "s" or (kind == "?" and w.ndim > 2):
        return _select(w, ids, axis, eqn)
    if scope.uses is not None:
        scope.note(w, "gather", {"i": (axis,)}, 0)
        return compat.bind(eqn, (w.view(), ids))
    rest = [k for k in range(w.ndim) if k != axis]
    out = Join(w, rest)
    if w.method is None or w.dims[axis] != tuple(w.of("i")) or sorted(out.atoms) != w.of("o"):
        return None
    offset = list(numbers.offset_dims)
    aval = eqn.outvars[0].aval
    order = [k for k in range(aval.ndim) if k not in offset] + offset

    def own():
        (y,) = compat.bind(eqn, (w.view(), ids))
        return out.join(_transpose(y, order))

    keys = ("mode", "fill_value", "indices_are_sorted", "unique_indices")
    options = {k: p[k] for k in keys}
    rows = Rows(ids, own, (*ids.shape[:-1], w.shape[axis]), w.dtype, options)
    y = out.split(applied(scope, w, rows, lambda x: x.own()))
    y = _transpose(y, [int(k) for k in np.argsort(order)])
    return [y.astype(aval.dtype)]


def _select(w: Lazy, ids: jax.Array, axis: int, eqn: Any) -> list[Any] | None:
    """Slices of a stack, w[ids]: the axis goes, the axes of `ids` (if any) come as stack axes."""
    numbers, lead = eqn.params["dimension_numbers"], ids.ndim - 1
    offset = numbers.offset_dims
    if lead and offset != tuple(range(lead, lead + w.ndim - 1)):
        return None
    keys = ("mode", "fill_value")
    options = {k: eqn.params[k] for k in keys}

    def take(t, axis):
        slot = tuple(range(lead, lead + t.ndim - 1))
        n = lax.GatherDimensionNumbers(slot, (axis,), (axis,))
        sizes = tuple(1 if k == axis else s for k, s in enumerate(t.shape))
        return lax.gather(t, ids, n, sizes, **options)

    return [w.select(axis, take, ids.shape[:-1])]


class Patches(Operand):
    """The patches [..., d_in] under a convolution's window; `x @ m` convolves with m."""

    def __init__(self, x, conv, own, kernel, shape):
        self._x, self._make = x, (conv, own, kernel, shape)
        super().__init__(lambda m: conv(x, kernel(m)), lambda: own(x), shape, x.dtype)

    def map(self, fn: Callable) -> "Patches":
        return Patches(fn(self._x), *self._make)


def conv(scope: Any, eqn: Any, x: Any, w: Any) -> list[Any] | None:
    """The rule of a convolution of any rank, stride, padding, dilation and grouping."""
    p = eqn.params
    spec = p["dimension_numbers"]
    if isinstance(x, Lazy) or not isinstance(w, Lazy):
        return None
    wo, *wi = spec.rhs_spec
    aval = eqn.outvars[0].aval
    if scope.uses is not None:
        size = 2 * math.prod(aval.shape) * math.prod(w.shape) // w.shape[wo]
        scope.note(w, "conv", {"i": wi}, size)
        return compat.bind(eqn, (x, w.view()))
    wi = sorted(wi)
    inner, out = Join(w, wi), Join(w, [wo])
    if w.method is None or sorted(inner.atoms) != w.of("i") or sorted(out.atoms) != w.of("o"):
        return None
    options = {k: v for k, v in p.items() if k != "dimension_numbers"}
    groups = p["feature_group_count"]
    last = [*(k for k in range(aval.ndim) if k != spec.out_spec[1]), spec.out_spec[1]]
    back = [int(k) for k in np.argsort(last)]

    def run(x, kernel):
        y = lax.conv_general_dilated(x, kernel, dimension_numbers=spec, **options)
        return _transpose(y, last)

    def kernel(m):  # [d_in, k] -> the model's layout with k output features
        axes = [*wi, wo]
        m = jnp.moveaxis(inner.split(m.T), 0, -1)
        return _transpose(m.astype(x.dtype), [int(k) for k in np.argsort(axes)])

    if groups > 1 or p["batch_group_count"] > 1:
        return _grouped(w, x, run, kernel, out, groups, p, back, aval)
    shape = (*(aval.shape[k] for k in last[:-1]), w.site.d_in)
    patches = Patches(x, run, lambda x: out.join(run(x, w.view())), kernel, shape)
    y = _transpose(out.split(applied(scope, w, patches, lambda x: x.own())), back)
    return [y.astype(aval.dtype)]


def _grouped(w, x, run, kernel, out, groups, p, back, aval):
    """Every group has patches of its own: factors if there are any, the merged kernel if not."""
    uv = w.method.factors({**w.shared, **w.own})
    if uv is None or p["batch_group_count"] > 1 or out.atoms != sorted(out.atoms):
        return [_transpose(run(x, w.merged()), back).astype(aval.dtype)]
    u, v = uv
    y = run(x, w.view())
    h = run(x, kernel(jnp.tile(u, (1, groups))))  # every group sees u: [..., groups * R]
    h = h.reshape(*h.shape[:-1], groups, u.shape[1])
    v = v.reshape(u.shape[1], groups, -1).astype(h.dtype)
    d = jnp.einsum("...gr,rgo->...go", h, v).reshape(y.shape)
    return [_transpose(y + d.astype(y.dtype), back).astype(aval.dtype)]

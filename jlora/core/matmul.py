"""Where a lazy weight is used up: matmul, convolution and table lookup.

Each hands the method an `x` whose last axis is d_in (or something that stands for it) and a `w`
that runs the model's own operation, and puts the answer back into the model's layout.

Deviates: nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.core import compat
from jlora.core.lazy import Lazy, merged
from jlora.core.method import low_rank
from jlora.core.site import at_least_float32, inverse_permutation, transposed


class Weight:
    """The `w` of `Method.apply`: `x @ w` is the model's own operation on the base weight."""

    __array_ufunc__ = None  # so that numpy leaves `x @ w` to us

    def __init__(self, lazy: Lazy, own: Callable | None, x: Any):
        self._lazy, self._own, self._x = lazy, own, x
        self.shape = (lazy.size("i"), lazy.size("o"))
        self.dtype = lazy.dtype

    def __rmatmul__(self, x: Any) -> jax.Array:
        alike = isinstance(x, Operand) == isinstance(self._x, Operand)
        if self._own is not None and alike and x.shape == self._x.shape:
            return self._own(x if isinstance(x, Operand) else x.astype(self._x.dtype))
        return compat.matmul(x, self._lazy.cast(self._lazy.matrix()).astype(x.dtype))

    def dense(self) -> jax.Array:
        """The base matrix [d_in, d_out], in at least float32."""
        m = self._lazy.matrix()
        return m.astype(at_least_float32(m.dtype))

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

    def join(self, x: jax.Array) -> jax.Array:
        """[..., *shape] -> [..., d]."""
        lead = x.shape[: x.ndim - len(self.shape)]
        if self.atoms != sorted(self.atoms):
            x = x.reshape(*lead, *self._sizes)
            x = transposed(x, self._after(lead, inverse_permutation(self.atoms)))
        return x.reshape(*lead, math.prod(self._sizes))

    def split(self, y: jax.Array) -> jax.Array:
        """[..., d] -> [..., *shape]."""
        lead = y.shape[:-1]
        if self.atoms != sorted(self.atoms):
            order = inverse_permutation(self.atoms)
            y = y.reshape(*lead, *(self._sizes[k] for k in order))
            y = transposed(y, self._after(lead, inverse_permutation(order)))
        return y.reshape(*lead, *self.shape)

    @staticmethod
    def _after(lead: Sequence[int], order: Sequence[int]) -> list[int]:
        return [*range(len(lead)), *(len(lead) + k for k in order)]


def applied(scope: Any, w: Lazy, x: Any, own: Callable) -> jax.Array:
    """The method on x [..., d_in]; notes what it reports."""
    assert w.method is not None
    ctx = scope.enter(w.site)
    y = w.method.apply(x, Weight(w, own, x), w.prepared(), ctx)
    if isinstance(y, tuple):
        y, report = y
        scope.report(w.site.path, report)
    return y


def applied_transposed(scope: Any, w: Lazy, x: jax.Array, own: Callable) -> jax.Array | None:
    """x [..., d_out] @ merge(w, p).T, for weights used both ways (tied embeddings)."""
    method, p = w.method, w.prepared()
    assert method is not None
    uv = method.factors(p)
    if uv is not None:
        y = own(x)
        return y + low_rank(x, uv[1].T, uv[0].T).astype(y.dtype)
    if not method.merges:
        return None
    ctx = scope.enter(w.site)
    like = jax.ShapeDtypeStruct((*x.shape[:-1], w.size("i")), x.dtype)

    def forward(z):
        y = method.apply(z, Weight(w, None, z), p, ctx)
        return (y[0] if isinstance(y, tuple) else y).astype(x.dtype)

    return jax.linear_transpose(forward, like)(x)[0]


def dot_general(scope: Any, eqn: Any, lhs: Any, rhs: Any) -> list[Any] | None:
    """The rule of a matmul: either operand, any axes, weight axes in any order."""
    if isinstance(lhs, Lazy) and isinstance(rhs, Lazy):
        return None  # the rule of products in `views`
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
    x = jnp.asarray(x)
    options = {k: v for k, v in eqn.params.items() if k != "dimension_numbers" and v is not None}
    y = _product(scope, w, x, wx, left, options)
    return None if y is None else [y.astype(eqn.outvars[0].aval.dtype)]


def _product(scope, w, x, dims, left, options):
    wc, xc, wb, xb = dims
    wf = [k for k in range(w.ndim) if k not in (*wc, *wb)]
    alone = [k for k in wf if w.stacks(k)]  # x has no such axis: it is the same for all slices
    if wb or alone:  # one stack axis less, mapped
        k, own_x = (wb[0], xb[0]) if wb else (alone[0], None)
        peeled = w.peel(k)
        if peeled is None:
            return None
        arrays, rebuild = peeled
        mine = (without_axis(wc, k), xc if own_x is None else without_axis(xc, own_x))
        less = (
            *mine,
            without_axis(wb[1:], k),
            () if own_x is None else without_axis(xb[1:], own_x),
        )
        place = 0 if wb else wf.index(k) + (0 if left else x.ndim - len(xc))
        template = scope.fork()
        options = {k: v for k, v in options.items() if k != "out_sharding"}

        def one(arrays, x, i):
            child = template.child(i)
            return _product(child, rebuild(arrays), x, less, left, options), child.aux

        steps = jnp.arange(w.shape[k], dtype=jnp.int32)
        y, aux = jax.vmap(one, (0, own_x, 0), (place, 0))(arrays, x, steps)
        scope.join(template, aux)
        return y
    xf = [k for k in range(x.ndim) if k not in xc]
    con, out = Join(w, wc), Join(w, wf)
    if sorted(con.atoms) == w.of("i") and sorted(out.atoms) == w.of("o"):
        apply = applied
    elif sorted(con.atoms) == w.of("o") and sorted(out.atoms) == w.of("i"):
        apply = applied_transposed
    else:
        return None
    order = [*xf, *xc]
    back = inverse_permutation(order)
    n = len(wf)

    def own(x2):
        x1 = transposed(con.split(x2), back)
        args = (w.view(), x1) if left else (x1, w.view())
        numbers = ((wc, xc) if left else (xc, wc), ((), ()))
        y = lax.dot_general(*args, numbers, **options)
        return out.join(transposed(y, [*range(n, y.ndim), *range(n)]) if left else y)

    y = apply(scope, w, con.join(transposed(x, order)), own)
    if y is None:
        return None
    y = out.split(y)
    return transposed(y, [*range(y.ndim - n, y.ndim), *range(y.ndim - n)]) if left else y


def without_axis(axes: Sequence[int], gone: int) -> tuple[int, ...]:
    """Axes renumbered for an array from which the axis `gone`, none of them, is taken."""
    return tuple(k - (k > gone) for k in axes)

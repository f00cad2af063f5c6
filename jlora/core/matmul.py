"""Where a lazy weight is used up: matmul, convolution and table lookup.

Each hands the method an `x` whose last axis is d_in (or something that stands for it) and a `w`
that runs the model's own operation, and puts the answer back into the model's layout.

Deviates: nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Shaped

from jlora.core import compat
from jlora.core.lazy import Lazy, merged
from jlora.core.method import Method, low_rank
from jlora.core.scope import Scope
from jlora.core.site import Arrays, at_least_float32, inverse_permutation, transposed
from jlora.types import Dynamic


class Weight:
    """The `w` of `Method.apply`: `x @ w` is the model's own operation on the base weight."""

    __array_ufunc__ = None  # so that numpy leaves `x @ w` to us

    def __init__(self, lazy: Lazy, own: Callable | None, x: Dynamic):
        self._lazy, self._own, self._x = lazy, own, x
        self.shape = (lazy.size("i"), lazy.size("o"))
        self.dtype = lazy.dtype

    def __rmatmul__(self, x: Dynamic) -> jax.Array:
        alike = isinstance(x, Operand) == isinstance(self._x, Operand)
        if self._own is not None and alike and x.shape == self._x.shape:
            return self._own(x if isinstance(x, Operand) else x.astype(self._x.dtype))
        return compat.matmul(x, self._lazy.cast(self._lazy.matrix()).astype(x.dtype))

    def dense(self) -> Float[jax.Array, "d_in d_out"]:
        """The base matrix.

        Returns:
          [d_in, d_out], in at least float32.
        """
        m = self._lazy.matrix()
        return m.astype(at_least_float32(m.dtype))

    def merged(self, method: Method, p: Arrays) -> Float[jax.Array, "d_in d_out"]:
        """The merged matrix.

        Args:
          method: whose `merge` it is.
          p: its arrays, as `apply` got them.

        Returns:
          merge(w, p) [d_in, d_out], in the dtype that the model multiplies with.
        """
        return self._lazy.cast(merged(method, self._lazy.matrix(), dict(p), {}, 0))


class Operand:
    """Stands for an x [..., d_in] too large to write down; `x @ m` is cheap, the rest is not."""

    shape: tuple[int, ...]
    dtype: Dynamic

    def __init__(self, times: Callable, own: Callable, shape: Sequence[int], dtype: Dynamic):
        self._times, self._own, self.shape, self.dtype = times, own, tuple(shape), dtype

    def __matmul__(self, m: Dynamic) -> jax.Array:
        return m.__rmatmul__(self) if isinstance(m, Weight) else self._times(m)

    @property
    def ndim(self) -> int:
        """How many axes x has."""
        return len(self.shape)

    def own(self) -> jax.Array:
        """What the model's own operation gives.

        Returns:
          x @ w for the base weight, [..., d_out].
        """
        return self._own()

    def map(self, fn: Callable) -> "Operand":
        """An elementwise function of what it stands for.

        Args:
          fn: elementwise, and zero at zero.

        Returns:
          What stands for fn(x).
        """
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """x itself.

        Returns:
          [..., d_in].
        """
        return self._times(jnp.eye(self.shape[-1], dtype=self.dtype))

    def __jax_array__(self) -> jax.Array:
        return self.dense()


class Join:
    """Several axes, each of some atoms, as the one axis of the matrix that they make up."""

    def __init__(self, w: Lazy, axes: Sequence[int]):
        self.atoms = [a for k in axes for a in w.dims[k]]
        self.shape = [w.shape[k] for k in axes]
        self._sizes = [w.atoms[a].size for a in self.atoms]

    def join(self, x: Shaped[jax.Array, "*lead_and_axes"]) -> Shaped[jax.Array, "*lead d"]:
        """The axes as one.

        Args:
          x: [..., *shape].

        Returns:
          [..., d], in the order of the matrix.
        """
        lead = x.shape[: x.ndim - len(self.shape)]
        if self.atoms != sorted(self.atoms):
            x = x.reshape(*lead, *self._sizes)
            x = transposed(x, self._after(lead, inverse_permutation(self.atoms)))
        return x.reshape(*lead, math.prod(self._sizes))

    def split(self, y: Shaped[jax.Array, "*lead d"]) -> Shaped[jax.Array, "*lead_and_axes"]:
        """The inverse of `join`.

        Args:
          y: [..., d].

        Returns:
          [..., *shape].
        """
        lead = y.shape[:-1]
        if self.atoms != sorted(self.atoms):
            order = inverse_permutation(self.atoms)
            y = y.reshape(*lead, *(self._sizes[k] for k in order))
            y = transposed(y, self._after(lead, inverse_permutation(order)))
        return y.reshape(*lead, *self.shape)

    @staticmethod
    def _after(lead: Sequence[int], order: Sequence[int]) -> list[int]:
        return [*range(len(lead)), *(len(lead) + k for k in order)]


def applied(scope: Scope, w: Lazy, x: Dynamic, own: Callable) -> jax.Array:
    """The method on an activation; records what it reports and publishes.

    Args:
      scope: of the trace.
      w: a weight without stack axes.
      x: [..., d_in], or what stands for it.
      own: x -> [..., d_out], the model's own operation on the base.

    Returns:
      y [..., d_out].
    """
    assert w.method is not None
    ctx = scope.enter(w)
    y = w.method.apply(x, Weight(w, own, x), w.prepared(), ctx)
    if isinstance(y, tuple):
        y, report, *published = y
        if report:
            scope.report(w.site.path, report)
        for values in published:
            scope.publish(values)
    return y


def applied_transposed(
    scope: Scope, w: Lazy, x: Float[jax.Array, "*lead d_out"], own: Callable
) -> Float[jax.Array, "*lead d_in"] | None:
    """x @ merge(w, p).T, for weights used both ways (tied embeddings).

    Args:
      scope: of the trace.
      w: a weight without stack axes.
      x: the activation.
      own: x -> [..., d_in], the model's own operation on the base.

    Returns:
      [..., d_in]; None: the delta depends on x.
    """
    method, p = w.method, w.prepared()
    assert method is not None
    uv = method.factors(p)
    if uv is not None:
        y = own(x)
        return y + low_rank(x, uv[1].T, uv[0].T).astype(y.dtype)
    if not method.merges:
        return None
    ctx = scope.enter(w)
    like = jax.ShapeDtypeStruct((*x.shape[:-1], w.size("i")), x.dtype)

    def forward(z):
        y = method.apply(z, Weight(w, None, z), p, ctx)
        return (y[0] if isinstance(y, tuple) else y).astype(x.dtype)

    return jax.linear_transpose(forward, like)(x)[0]


def dot_general(scope: Scope, eqn: Dynamic, lhs: Dynamic, rhs: Dynamic) -> list[Dynamic] | None:
    """The rule of a matmul: either operand, any axes, weight axes in any order.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    if isinstance(lhs, Lazy) and isinstance(rhs, Lazy):
        return None  # the rule of products in `views`
    left = isinstance(lhs, Lazy)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    of_lhs, of_rhs = _axes(lhs, lhs_contract, lhs_batch), _axes(rhs, rhs_contract, rhs_batch)
    w, x, of_w, of_x = (lhs, rhs, of_lhs, of_rhs) if left else (rhs, lhs, of_rhs, of_lhs)
    if scope.uses is not None:
        terms = math.prod(w.shape[k] for k in of_w.contract)
        flops = 2 * math.prod(eqn.outvars[0].aval.shape) * terms
        scope.note(w, "dot", {"i": of_w.contract, "s": of_w.batch}, flops)
        return compat.bind(eqn, (w.view(), x) if left else (x, w.view()))
    if w.method is None:
        return None
    x = jnp.asarray(x)
    options = {k: v for k, v in eqn.params.items() if k != "dimension_numbers" and v is not None}
    y = _product(scope, w, x, of_w, of_x, left, options)
    return None if y is None else [y.astype(eqn.outvars[0].aval.dtype)]


class Axes(NamedTuple):
    """The axes of one operand of a matmul."""

    contract: tuple[int, ...]  # summed over, in the order of the other operand's
    batch: tuple[int, ...]  # mapped over together with the other operand's
    free: tuple[int, ...]  # that the result keeps

    def without(self, axis: int | None) -> "Axes":
        """The axes of the operand inside `jax.vmap` over one of them.

        Args:
          axis: that is mapped over; None: none.

        Returns:
          The other axes, renumbered.
        """
        if axis is None:
            return self
        kept = (tuple(k - (k > axis) for k in axes if k != axis) for axes in self)
        return Axes(*kept)


def _axes(operand: Dynamic, contract: Sequence[int], batch: Sequence[int]) -> Axes:
    free = tuple(k for k in range(operand.ndim) if k not in (*contract, *batch))
    return Axes(tuple(contract), tuple(batch), free)


def _product(scope, w, x, of_w, of_x, left, options):
    """The product in the order of `dot_general`: batch axes, then those free in lhs and in rhs."""
    unshared = [k for k in of_w.free if w.stacks(k)]  # stack axes that x has no part in
    if of_w.batch or unshared:
        return _mapped_product(scope, w, x, of_w, of_x, left, options)
    ins, outs = Join(w, of_w.contract), Join(w, of_w.free)
    if sorted(ins.atoms) == w.of("i") and sorted(outs.atoms) == w.of("o"):
        apply = applied
    elif sorted(ins.atoms) == w.of("o") and sorted(outs.atoms) == w.of("i"):
        apply = applied_transposed
    else:
        return None
    order = [*of_x.free, *of_x.contract]
    back, kept = inverse_permutation(order), len(of_w.free)

    def own(x2):  # [..., d_in] -> [..., d_out], the model's own equation
        x1 = transposed(ins.split(x2), back)
        operands = (w.view(), x1) if left else (x1, w.view())
        contract = (of_w.contract, of_x.contract) if left else (of_x.contract, of_w.contract)
        y = lax.dot_general(*operands, (contract, ((), ())), **options)
        return outs.join(_rotated(y, kept) if left else y)

    y = apply(scope, w, ins.join(transposed(x, order)), own)
    if y is None:
        return None
    y = outs.split(y)
    return _rotated(y, y.ndim - kept) if left else y


def _mapped_product(scope, w, x, of_w, of_x, left, options):
    """One stack axis of the weight less, by `jax.vmap`: x has it as a batch axis, or not at all."""
    if of_w.batch:
        w_axis, x_axis, out_axis = of_w.batch[0], of_x.batch[0], 0
    else:
        w_axis, x_axis = next(k for k in of_w.free if w.stacks(k)), None
        out_axis = of_w.free.index(w_axis) + (0 if left else len(of_x.free))
    unstacked = w.unstack(w_axis)
    if unstacked is None:
        return None
    arrays, rebuild = unstacked
    of_w, of_x = of_w.without(w_axis), of_x.without(x_axis)
    body = scope.fork()
    options = {k: v for k, v in options.items() if k != "out_sharding"}

    def one(arrays, x, i):
        child = body.child(i)
        return _product(child, rebuild(arrays), x, of_w, of_x, left, options), child.aux

    steps = jnp.arange(w.shape[w_axis], dtype=jnp.int32)
    y, aux = jax.vmap(one, (0, x_axis, 0), (out_axis, 0))(arrays, x, steps)
    scope.join(body, aux)
    return y


def _rotated(y: jax.Array, by: int) -> jax.Array:
    """The first `by` axes moved behind the others."""
    return transposed(y, [*range(by, y.ndim), *range(by)])

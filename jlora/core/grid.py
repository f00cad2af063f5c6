"""A low-rank delta in the axes of a view of its weight.

Each axis of a view V of a matrix W [d_in, d_out] comes from rows, from columns or from a stack, so
an adapter with factors has factors in the view, too:

.. math:: V(W + u v) = V(W) + V_{in}(u) \\, V_{out}(v)

Reference: none; follows from linearity.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jlora.core.atoms import Atom
from jlora.core.lazy import Lazy, leaf
from jlora.core.matmul import Weight
from jlora.core.method import Method
from jlora.core.scope import Scope
from jlora.core.site import Arrays, Site
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Factors(Method):
    """W + u v, [d_in, d_out]: what a method with factors is on a part of a weight."""

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        return p["u"], p["v"]


class Grid(NamedTuple):
    """A delta sum_r u_r v_r in the axes of a view."""

    kinds: tuple[str, ...]  # of each axis: 's', 'i' or 'o'; '' for one that is no atom, of size 1
    u: jax.Array  # [*axes, R], of size 1 along the 'o' axes
    v: jax.Array  # [*axes, R], of size 1 along the 'i' axes

    def along(self, axis: int, move: Callable) -> "Grid":
        """Moves along one axis, such as a slice or a flip.

        Args:
          axis: of the view.
          move: `move(array, axis)`, linear; runs on the factors that vary along the axis.

        Returns:
          The delta after the move.
        """
        kind = self.kinds[axis] or "s"
        kinds = (*self.kinds[:axis], kind, *self.kinds[axis + 1 :])
        u = self.u if kind == "o" else move(self.u, axis)
        v = self.v if kind == "i" else move(self.v, axis)
        return Grid(kinds, u, v)

    def swapped(self) -> "Grid":
        """The same delta with rows called columns.

        Returns:
          u and v exchanged.
        """
        other = {"i": "o", "o": "i"}
        return Grid(tuple(other.get(k, k) for k in self.kinds), self.v, self.u)


class _Context(Mapping):
    """Side inputs that note whether they are read."""

    def __init__(self, ctx: Mapping[str, Dynamic]):
        self._ctx, self.read = ctx, False

    def __getitem__(self, name: str) -> Dynamic:
        self.read = True
        return self._ctx[name]

    def __iter__(self) -> Iterator[str]:
        self.read = True
        return iter(self._ctx)

    def __len__(self) -> int:
        self.read = True
        return len(self._ctx)


def reads_context(scope: Scope, w: Lazy) -> bool:
    """Whether the method's `apply` is more than x @ merge(w, p) here: reads `ctx`, or reports.

    Args:
      scope: of the trace; its side inputs and reports count.
      w: the weight.

    Returns:
      False for a weight without an adapter.
    """
    method = w.method
    if method is None or not (scope.visible(w) or scope.reporting):
        return False
    if type(method).apply is Method.apply:
        return False
    ctx, n = _Context(scope.visible(w)), len(w.of("s"))

    def one(x):
        own = jax.tree.map(lambda t: t[(0,) * n], w.parameters())
        m = w.matrix()[(0,) * n]
        matrix = leaf(m, Site(w.site.path, m.shape, "io", m.dtype), method, own, w.shared)
        y = method.apply(x, Weight(matrix, None, x), {**w.shared, **own}, ctx)
        return len(y) if isinstance(y, tuple) else 1  # with reports, with what it publishes

    x = jax.ShapeDtypeStruct((1, w.size("i")), w.dtype)
    parts: list[int] = []
    try:
        jax.eval_shape(lambda x: parts.append(one(x)), x)
    except Exception:  # x has other axes than the context is for: it has been read
        return True
    return ctx.read or parts[0] > 2 or (scope.reporting and parts[0] > 1)


def delta(scope: Scope, w: Lazy) -> Grid | jax.Array | None:
    """The delta of an adapted weight in its view.

    Args:
      scope: of the trace.
      w: the weight.

    Returns:
      The delta; the merged weight [*shape] where the method has no factors; None where neither is
      right: vectors, weights without an adapter, a delta that depends on x.
    """
    method, w = w.method, w.opened()
    if method is None or "i" not in w.site.kinds:
        return None
    kinds = _axis_kinds(w)
    stack = len(w.of("s"))

    def factors(own):
        return method.factors({**w.shared, **own})

    for _ in range(stack):
        factors = jax.vmap(factors)
    uv = factors(w.parameters())
    if kinds is None and uv is not None:
        return None
    if reads_context(scope, w):  # per-site side inputs have the axes of the leaf, not of the view
        if w.side() or uv is None or _of_factors(method, uv, stack) is None:
            return None
    if uv is not None and kinds is not None:
        return Grid(kinds, _spread(w, uv[0], "i"), _spread(w, jnp.swapaxes(uv[1], -1, -2), "o"))
    return w.merged() if method.merges else None


def _of_factors(method: Method, uv: Dynamic, stack: int) -> Arrays | None:
    again = method.of_factors
    for _ in range(stack):
        again = jax.vmap(again)
    return again(*uv)


def _axis_kinds(w: Lazy) -> tuple[str, ...] | None:
    kinds = []
    for dim in w.dims:
        axis_kinds = {w.atoms[a].kind for a in dim if w.atoms[a].size > 1}
        axis_kinds = axis_kinds or {w.atoms[a].kind for a in dim[:1]}
        if len(axis_kinds) > 1:
            return None
        kinds.append(next(iter(axis_kinds), ""))
    return tuple(kinds)


def _spread(w: Lazy, t: jax.Array, kind: str) -> jax.Array:
    """[*stack, d, R] -> [*axes of the view, R], of size 1 along the axes of the other kind."""
    kept = (*w.of("s"), *w.of(kind))
    order = [a for dim in w.dims for a in dim if a in kept]
    t = t.reshape(*(w.atoms[a].size for a in kept), t.shape[-1])
    t = t.transpose(*(kept.index(a) for a in order), len(kept))
    sizes = [[w.atoms[a].size for a in dim if a in kept] for dim in w.dims]
    return t.reshape(*(functools.reduce(int.__mul__, n, 1) for n in sizes), t.shape[-1])


def rebuilt(scope: Scope, w: Lazy, base: Float[jax.Array, "*shape"], grid: Grid) -> Lazy:
    """A lazy weight from its delta.

    Args:
      scope: of the trace.
      w: the weight that the delta comes from.
      base: what the model sees of the weight itself.
      grid: the delta, in the axes of `base`.

    Returns:
      A weight of the method `Factors`, or of `w.method` where its `apply` does more.
    """
    axes = [k for k, kind in enumerate(grid.kinds) if kind]
    atoms = tuple(Atom(grid.kinds[k], base.shape[k], ()) for k in axes)
    dims = tuple((axes.index(k),) if k in axes else () for k in range(base.ndim))
    stack = [k for k, kind in enumerate(grid.kinds) if kind == "s"]

    def flat(t):
        t = t.transpose(*stack, *(k for k in range(base.ndim) if k not in stack), base.ndim)
        return t.reshape(*(base.shape[k] for k in stack), -1, t.shape[-1])

    uv = flat(grid.u), jnp.swapaxes(flat(grid.v), -1, -2)
    method: Method = Factors()
    own: Arrays | None = {"u": uv[0], "v": uv[1]}
    if w.method is not None and reads_context(scope, w):
        method, own = w.method, _of_factors(w.method, uv, len(stack))
    assert own is not None
    site = dataclasses.replace(w.site, dtype=base.dtype)
    return Lazy(base, own, {}, site, method, atoms, dims)

"""Table lookup: a gather along the in axis is a matmul with one-hot rows.

A row number stands for the row; the method multiplies it with its own thin matrices by looking up
in them. A gather along a stack axis only chooses slices.

Source: our reading.
Deviates: none.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.core import compat
from jlora.core.adapter import inverse, transposed
from jlora.core.lazy import Lazy
from jlora.core.matmul import Join, Operand, applied


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
    ids, offset = jnp.asarray(ids), list(numbers.offset_dims)
    aval = eqn.outvars[0].aval
    order = [k for k in range(aval.ndim) if k not in offset] + offset

    def own():
        (y,) = compat.bind(eqn, (w.view(), ids))
        return out.join(transposed(y, order))

    keys = ("mode", "fill_value", "indices_are_sorted", "unique_indices")
    options = {k: p[k] for k in keys}
    rows = Rows(ids, own, (*ids.shape[:-1], w.shape[axis]), w.dtype, options)
    y = out.split(applied(scope, w, rows, lambda x: x.own()))
    y = transposed(y, inverse(order))
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

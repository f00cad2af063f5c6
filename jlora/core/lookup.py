"""Table lookup: a gather along the in axis is a matmul with one-hot rows.

A row number stands for the row; the method multiplies it with its own thin matrices by looking up
in them. A gather along a stack axis only chooses slices.

Deviates: nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jlora.core import compat
from jlora.core.lazy import Lazy
from jlora.core.matmul import Join, Operand, applied
from jlora.core.scope import Scope
from jlora.core.site import inverse_permutation, transposed
from jlora.types import Dynamic


class OneHotRows(Operand):
    """One-hot rows: `ids`, all of them inside the table, look up along the in axis."""

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

    def map(self, fn: Callable) -> "OneHotRows":
        """As `Operand.map`: the rows times one number each."""
        ones = jnp.ones((*self.shape[:-1], 1), self.dtype)
        gain = fn(ones if self._gain is None else self._gain)
        return OneHotRows(self._ids, self._bare, self.shape, self.dtype, self._options, gain)


class Lookup(NamedTuple):
    """A gather along one axis of a weight, in whichever of its forms JAX wrote it."""

    axis: int  # of the weight
    ids: jax.Array  # [..., 1], inside the axis
    inside: jax.Array  # [...], whether the id that was given is
    offset: list[int]  # axes of the result for the weight's other axes, without `kept`
    kept: int | None  # axis of the result of size one, where the weight's own axis stays
    mode: Dynamic  # of JAX: what an id outside the axis gives
    fill: Dynamic  # with mode FILL_OR_DROP; None: NaN

    def settle(self, y: Float[jax.Array, "*ids d"]) -> Float[jax.Array, "*ids d"]:
        """The value and the gradient that an id outside the axis has.

        Filled and promised ids give the weight no gradient: JAX drops them.

        Args:
          y: what was looked up with ids inside the axis.

        Returns:
          y with the fill value, or without gradient, where the id given was outside.
        """
        if self.mode == lax.GatherScatterMode.CLIP:
            return y
        inside = self.inside[..., None]
        if self.mode == lax.GatherScatterMode.FILL_OR_DROP:
            return jnp.where(
                inside, y, jnp.asarray(jnp.nan if self.fill is None else self.fill, y.dtype)
            )
        return jnp.where(inside, y, lax.stop_gradient(y))


def _lookup(w: Lazy, ids: Dynamic, p: Mapping[str, Dynamic]) -> Lookup | None:
    """None for a gather that is not of whole slices along one axis.

    `w[ids]` takes the axis away; `jax.vmap(lambda i: w[i])(ids)` keeps it with size one, and has a
    column of zeros for each other axis.
    """
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    gone, columns, mode = numbers.collapsed_slice_dims, numbers.start_index_map, p["mode"]
    mapped = numbers.operand_batching_dims
    cut = gone or tuple(k for k in range(w.ndim) if sizes[k] != w.shape[k] and k not in mapped)
    if len(cut) != 1 or cut[0] not in columns:
        return None
    (axis,) = cut
    rest = [k for k in range(w.ndim) if k != axis and k not in mapped]
    if sizes[axis] != 1 or any(sizes[k] != w.shape[k] for k in rest):
        return None
    if len(columns) > 1 and mode == lax.GatherScatterMode.FILL_OR_DROP:  # not surely zeros
        return None
    ids, offset, kept = jnp.asarray(ids), list(numbers.offset_dims), None
    at = columns.index(axis)
    ids = ids[..., at : at + 1]
    if not gone:
        kept = offset[axis]
        offset = [k - (k > kept) for k in offset if k != kept]
    top = min(w.shape[axis] - 1, jnp.iinfo(ids.dtype).max)
    safe = lax.clamp(jnp.zeros((), ids.dtype), ids, jnp.asarray(top, ids.dtype))
    return Lookup(axis, safe, jnp.all(safe == ids, -1), offset, kept, mode, p["fill_value"])


def gather(scope: Scope, eqn: Dynamic, w: Dynamic, ids: Dynamic) -> list[Dynamic] | None:
    """The rule of a lookup along one axis: of a table's rows, or of slices of a stack.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    if not isinstance(w, Lazy) or isinstance(ids, Lazy):
        return None
    return _taken(scope, eqn, eqn.params, w, ids, eqn.outvars[0].aval)


def _taken(
    scope: Scope, eqn: Dynamic, p: Mapping[str, Dynamic], w: Lazy, ids: Dynamic, aval: Dynamic
) -> list[Dynamic] | None:
    """A gather with the parameters `p` that gives an array as `aval` is."""
    mapped = p["dimension_numbers"].operand_batching_dims
    if mapped and scope.uses is None:
        return _tables(scope, eqn, p, w, ids, aval)
    lookup = _lookup(w, ids, p)
    if lookup is None or len(w.dims[lookup.axis]) != 1:
        return None
    axis, kind = lookup.axis, w.atoms[w.dims[lookup.axis][0]].kind
    layer = jnp.ndim(ids) == 1 and scope.times > 1  # one slice per step of a loop, not a row
    if kind == "s" or (kind == "?" and (w.ndim - len(mapped) > 2 or layer)):
        out = None if mapped else _select(w, ids, lookup, p)
        if out is not None or kind == "s" or mapped:
            return out
    if scope.uses is not None:
        scope.note(w, "gather", {"i": (axis,), "s": mapped}, 0)
        return compat.bind(eqn, (w.view(), ids))
    rest = [k for k in range(w.ndim) if k != axis]
    out = Join(w, rest)
    if w.method is None or w.dims[axis] != tuple(w.of("i")) or sorted(out.atoms) != w.of("o"):
        return None
    offset, ids = lookup.offset, lookup.ids
    ndim = len(aval.shape) - (lookup.kept is not None)
    order = [k for k in range(ndim) if k not in offset] + offset
    options = {
        "mode": lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        "indices_are_sorted": p["indices_are_sorted"] and lookup.kept is None,
    }

    def own():
        numbers = lax.GatherDimensionNumbers(tuple(offset), (axis,), (axis,))
        sizes = tuple(1 if k == axis else n for k, n in enumerate(w.shape))
        return out.join(transposed(lax.gather(w.view(), ids, numbers, sizes, **options), order))

    rows = OneHotRows(ids, own, (*ids.shape[:-1], w.shape[axis]), w.dtype, options)
    y = out.split(lookup.settle(applied(scope, w, rows, lambda x: x.own())))
    y = transposed(y, inverse_permutation(order))
    y = y if lookup.kept is None else jnp.expand_dims(y, lookup.kept)
    return [y.astype(aval.dtype)]


def _tables(
    scope: Scope, eqn: Dynamic, p: Mapping[str, Dynamic], w: Lazy, ids: Dynamic, aval: Dynamic
) -> list[Dynamic] | None:
    """A table for each of a stack, `jax.vmap(lambda w, i: w[i])(w, ids)`: one stack axis less."""
    n = p["dimension_numbers"]
    k, b = n.operand_batching_dims[0], n.start_indices_batching_dims[0]
    place = [q for q in range(len(aval.shape)) if q not in n.offset_dims][b]
    unstacked = w.unstack(k)
    if unstacked is None:
        return None
    arrays, rebuild = unstacked
    less = {
        **p,
        "dimension_numbers": lax.GatherDimensionNumbers(
            _without(n.offset_dims, place), _without(n.collapsed_slice_dims, k),
            _without(n.start_index_map, k), _without(n.operand_batching_dims[1:], k),
            _without(n.start_indices_batching_dims[1:], b),
        ),
        "slice_sizes": (*p["slice_sizes"][:k], *p["slice_sizes"][k + 1 :]),
    }  # fmt: skip
    one_less = jax.ShapeDtypeStruct((*aval.shape[:place], *aval.shape[place + 1 :]), aval.dtype)
    template = scope.fork()

    def one(arrays, ids, i):
        child = template.child(i)
        out = _taken(child, eqn, less, rebuild(arrays), ids, one_less)
        return None if out is None else child.dense(out[0], eqn), child.aux

    steps = jnp.arange(w.shape[k], dtype=jnp.int32)
    y, aux = jax.vmap(one, (0, b, 0), (place, 0))(arrays, jnp.asarray(ids), steps)
    scope.join(template, aux)
    return None if y is None else [y]


def _without(axes: Sequence[int], gone: int) -> tuple[int, ...]:
    """Axes renumbered for an array from which the axis `gone`, none of them, is taken."""
    return tuple(k - (k > gone) for k in axes)


def _select(w: Lazy, ids: Dynamic, spec: Lookup, p: Mapping[str, Dynamic]) -> list[Dynamic] | None:
    """Slices of a stack, w[ids]: the axis goes, the axes of `ids` (if any) come as stack axes."""
    at = p["dimension_numbers"].start_index_map.index(spec.axis)
    ids = jnp.asarray(ids)[..., at : at + 1]  # as they were given: the mode says what they mean
    lead = ids.ndim - 1
    if lead and spec.offset != list(range(lead, lead + w.ndim - 1)):
        return None

    def take(fill):
        def slices(t, axis):
            slot = tuple(range(lead, lead + t.ndim - 1))
            n = lax.GatherDimensionNumbers(slot, (axis,), (axis,))
            sizes = tuple(1 if k == axis else s for k, s in enumerate(t.shape))
            return lax.gather(t, ids, n, sizes, mode=spec.mode, fill_value=fill)

        return slices

    # an adapter's slice outside the stack is zero: NaN would reach the tensors that sites share
    out = w.select(spec.axis, take(spec.fill), ids.shape[:-1], take(0))
    if spec.kept is None:
        return [out]
    opened = out.reshaped((*out.shape[: spec.kept], 1, *out.shape[spec.kept :]))
    return None if opened is None else [opened]

"""A weight times a number, or times one number for each row, column or slice.

.. math:: g \\odot (W + u v) = g \\odot W + (g \\odot u) v

for one number per row; per column v is scaled. Numbers that vary along rows and columns leave no
factors: the weight has to be merged.

Reference: none; follows from linearity.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jlora.core import compat
from jlora.core.grid import Grid, delta, rebuilt
from jlora.core.lazy import Lazy
from jlora.core.scope import Scope
from jlora.types import Dynamic


def negative(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of a change of sign.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    return _scaled(scope, w, lambda t: compat.bind(eqn, (t,)), jnp.asarray(-1, w.dtype))


def multiply(scope: Scope, eqn: Dynamic, a: Dynamic, b: Dynamic) -> list[Dynamic] | None:
    """The rule of a weight times a number, or times one number for each row, column or slice.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    shape = eqn.outvars[0].aval.shape
    whole = [isinstance(v, Lazy) and v.shape == shape for v in (a, b)]
    if whole[0] == whole[1]:
        return None
    left = whole[0]
    w, by = (a, b) if left else (b, a)
    by = jnp.asarray(scope.dense(by, eqn))
    return _scaled(scope, w, lambda t: compat.bind(eqn, (t, by) if left else (by, t)), by)


def divide(scope: Scope, eqn: Dynamic, w: Dynamic, by: Dynamic) -> list[Dynamic] | None:
    """The rule of a weight over a number, or over one number for each row, column or slice.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    if not isinstance(w, Lazy) or w is by or w.shape != eqn.outvars[0].aval.shape:
        return None
    by = jnp.asarray(scope.dense(by, eqn))
    return _scaled(scope, w, lambda t: compat.bind(eqn, (t, by)), 1 / by)


def _scaled(scope: Scope, w: Lazy, run: Callable, by: jax.Array) -> list[Dynamic] | None:
    axes = [k for k, n in enumerate(by.shape) if n > 1]
    if scope.uses is not None:
        every = [k for k, n in enumerate(w.shape) if n > 1]
        if axes and axes == every:
            return None
        name = "gain" if axes else "scale"
        return [_seen(w, base, name, axes or every) for base in run(w.view())]
    low_rank = delta(scope, w)
    if not isinstance(low_rank, Grid):
        return None if low_rank is None else run(low_rank)
    kinds = {low_rank.kinds[k] for k in axes} - {"s", ""}
    if len(kinds) > 1:
        return None
    by = by[..., None] if by.ndim else by
    if kinds == {"o"}:
        grid = low_rank._replace(v=low_rank.v * by.astype(low_rank.v.dtype))
    else:
        grid = low_rank._replace(u=low_rank.u * by.astype(low_rank.u.dtype))
    return [rebuilt(scope, w, base, grid) for base in run(w.view())]


def _seen(w: Lazy, base: jax.Array, name: str, axes: Sequence[int]) -> Lazy:
    changed = frozenset(s for k in axes for s in w.sources(k))
    return w.replace(base=base, casts=(), views=(*w.views, (name, changed)))

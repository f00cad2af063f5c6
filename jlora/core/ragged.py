"""Ragged matmul: rows of x in groups, each multiplied by its own slice of a stack.

This is how sparse mixtures run their experts. With factors it is three ragged matmuls:

.. math:: y_t = x_t W_{g(t)} + (x_t u_{g(t)}) v_{g(t)}

Cost: a method without factors merges the whole stack.

Reference: none; `jax.lax.ragged_dot_general` is what it runs.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jlora.core import compat
from jlora.core.grid import Grid, delta, reads_context
from jlora.core.lazy import Lazy
from jlora.core.scope import Scope
from jlora.types import Dynamic


def ragged_dot(
    scope: Scope, eqn: Dynamic, x: Dynamic, w: Dynamic, *sizes: Dynamic
) -> list[Dynamic] | None:
    """The rule of x [T, d_in] and w [groups, d_in, d_out], axes of w in any order.

    Args:
      scope: of the trace.
      eqn: a ragged matmul.
      x: rows in groups, an array.
      w: the stack of weights.
      sizes: of the groups; one array.

    Returns:
      [y [T, d_out]]; None: the stack has to be merged.
    """
    p = eqn.params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, wb) = p.dot_dimension_numbers
    if isinstance(x, Lazy) or not isinstance(w, Lazy) or len(p.rhs_group_dimensions) != 1:
        return None
    (group,), aval = p.rhs_group_dimensions, eqn.outvars[0].aval
    if scope.uses is not None:
        flops = 2 * math.prod(aval.shape) * math.prod(w.shape[k] for k in wc)
        scope.note(w, "ragged_dot", {"i": wc, "s": (group, *wb)}, flops)
        return compat.bind(eqn, (x, w.view(), *sizes))
    low_rank = None if reads_context(scope, w) else delta(scope, w)
    if not isinstance(low_rank, Grid):
        return None if low_rank is None else compat.bind(eqn, (x, low_rank, *sizes))
    free = [k for k in range(w.ndim) if k not in (*wc, *wb, group)]
    if jnp.ndim(x) != 2 or xb or wb or len(wc) != 1 or len(free) != 1 or len(sizes) != 1:
        return None
    if low_rank.kinds[wc[0]] == "o":
        low_rank = low_rank.swapped()
    if [low_rank.kinds[k] for k in (group, wc[0], free[0])] != ["s", "i", "o"]:
        return None
    y = compat.bind(eqn, (x, w.view(), *sizes))[0]
    u = low_rank.u.transpose(group, wc[0], free[0], 3)[:, :, 0]
    v = low_rank.v.transpose(group, wc[0], free[0], 3)[:, 0].transpose(0, 2, 1)
    rows = jnp.asarray(x if xc[0] == 1 else x.T)

    def times(x: jax.Array, m: jax.Array) -> jax.Array:
        return lax.ragged_dot(x, m.astype(x.dtype), sizes[0])

    return [y + times(times(rows, u), v).astype(y.dtype)]

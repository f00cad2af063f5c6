r"""LaMDA's schedule: the rows of `b` are frozen one after the other, the first steps long.

==========  ==============================================================
n           step, from 0
N           `steps`: after so many all rows are frozen
u           updates of the optimizer before it
u_j         row j of those of `b`, of r rows
==========  ==============================================================

.. math:: u_j \leftarrow u_j \, [\, j \ge t \,], \qquad t = \lfloor r \, n / N \rfloor

Updates are masked, not gradients: moments and weight decay would go on moving a row whose gradient
is zero. A frozen row stays bitwise what it is. To be chained last:
``optax.chain(optax.adam(1e-3), gradual_freeze(300))``; the paper takes N = 0.3 of all steps.

Paper: Azizi, Kundu and Pedram 2024, arXiv:2406.12832.
Source: abstract and official code, whose t lacks the factor r.
Deviates: nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jlora.contracts.optimizer import Optimizer
from jlora.types import Dynamic, Tree


class FreezeState(NamedTuple):
    """State of `gradual_freeze`."""

    count: Int32[Array, ""]  # steps done, N at most


def gradual_freeze(steps: int, name: str = "b") -> optax.GradientTransformation:
    """Sets updates of the first rows of `b` to zero, more of them in each step.

    Args:
      steps: N, the step from which on all rows are frozen.
      name: of the array [*stack, r, d_out] whose rows are frozen.

    Returns:
      A transformation of trees like `Adapter.trainable`, or of one that contains it.

    Raises:
      ValueError: steps < 1; at `init`, where no array has that name.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")

    def is_named(path: Dynamic) -> bool:
        return bool(path) and str(getattr(path[-1], "key", path[-1])) == name

    def init(params: Tree) -> FreezeState:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if not any(is_named(path) for path in paths):
            raise ValueError(f"name: got {name!r}, expected the name of an array that is trained")
        return FreezeState(jnp.zeros((), jnp.int32))

    def update(updates: Tree, state: FreezeState, params: Tree = None) -> tuple[Tree, FreezeState]:
        del params

        def masked(path: Dynamic, u: Dynamic) -> Dynamic:
            if not is_named(path):
                return u
            frozen = state.count * u.shape[-2] // steps
            row = jax.lax.broadcasted_iota(jnp.int32, u.shape, u.ndim - 2)
            return jnp.where(row >= frozen, u, jnp.zeros_like(u))

        count = jnp.minimum(state.count + 1, steps)  # there it has no more to say
        return jax.tree_util.tree_map_with_path(masked, updates), FreezeState(count)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


SYSTEM = Optimizer(
    name="LaMDA's gradual freeze",
    paper="Azizi 2024, 2406.12832",
    symbol="gradual_freeze",
    evidence="rows counted by hand; frozen rows bitwise still under momentum and weight decay",
    kind="component",
    make=lambda: optax.chain(optax.adam(0.01), gradual_freeze(3)),
)

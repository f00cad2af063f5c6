"""Coefficients of a weighted sum of adapters, learned by gradient through the lifted model.

==========  ====================================================================
Delta_n     delta of adapter n, kept factored
c           coefficients: `[N]`, or one for each site and slice, {path: [N, *stack]}
L           a loss of an adapter and a batch, in terms of `jlora.lift`
==========  ====================================================================

.. math:: \\min_c \\; E_x \\, L\\Bigl(\\sum_n c_n \\Delta_n, \\, x\\Bigr)
          + \\lambda \\, \\mathrm{mean} |c|

The sum is a concatenation of factors, so neither it nor its gradient forms a matrix of the size of
a weight: dL/dc_n is read off thin products. What is learned is a few numbers, from a few examples.

Shapes: batches are PyTrees with a leading axis of steps; `values` [steps].

Paper: AdaMerging, Yang et al. 2023, arXiv:2310.02575 (coefficients by gradient).
Deviates: nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jlora.algebra import Deltas
from jlora.core.adapter import Adapter
from jlora.merging.engine.inputs import Gathered, per_site, to_adapter
from jlora.merging.exact.concat import concat
from jlora.system import System
from jlora.types import Batch, Dynamic, Tree

Loss = Callable[[Adapter, Dynamic], Array]


class Learned(NamedTuple):
    """What learning found."""

    adapter: Adapter  # the merge at the coefficients below
    coefficients: Dynamic  # [N], or {path: [N, *stack]}
    values: Array  # [steps], the objective before each step


def everywhere(gathered: Gathered, value: float) -> dict[str, Array]:
    """Coefficients of one value for every site, slice and adapter.

    Args:
      gathered: the bank.
      value: of all coefficients.

    Returns:
      {path: [N, *stack]}.
    """
    return {
        path: jnp.full(low[0].shape[:-2], value, low[0].dtype)
        for path, low in gathered.bank.items()
    }


def mixed(gathered: Gathered, coefficients: Dynamic, fn: Callable = concat) -> Adapter:
    """The adapter of coefficients.

    Args:
      gathered: the bank.
      coefficients: [N], or {path: [N, *stack]}.
      fn: a merge of one site; `concat`, an exact sum, by default.

    Returns:
      A LoRA adapter.
    """
    mixture: Deltas = per_site(fn)(gathered.bank, coefficients)
    return to_adapter(mixture, gathered.sites)


def penalised(loss: Loss, gathered: Gathered, l1: float, fn: Callable = concat) -> Callable:
    """A loss of coefficients: that of the merge, plus l1 times the mean of |coefficients|.

    Args:
      loss: of (adapter, batch).
      gathered: the bank.
      l1: strength of the penalty, >= 0.
      fn: a merge of one site; an exact sum by default.

    Returns:
      A function of (coefficients, batch).
    """

    def objective(coefficients: Dynamic, batch: Batch) -> Array:
        value = loss(mixed(gathered, coefficients, fn), batch)
        flat = jnp.concatenate([c.reshape(-1) for c in jax.tree.leaves(coefficients)])
        return value + l1 * jnp.mean(jnp.abs(flat)).astype(value.dtype)

    return objective


def learn(
    loss: Loss,
    gathered: Gathered,
    start: Dynamic,
    batches: Batch,
    *,
    rate: float = 1e-2,
    l1: float = 0.0,
    bound: float | None = None,
    fn: Callable = concat,
) -> Learned:
    """Adam on the coefficients, one step per batch; jitted by the caller, or run as it is.

    Args:
      loss: of (adapter, batch).
      gathered: the bank.
      start: the first coefficients, [N] or {path: [N, *stack]}.
      batches: examples with a leading axis of steps.
      rate: of Adam, > 0; 1e-2.
      l1: strength of the penalty on |coefficients|, >= 0; 0: none.
      bound: coefficients are projected to [-bound, bound] after each step; None: they are free.
      fn: a merge of one site; an exact sum by default.

    Returns:
      The merged adapter, its coefficients, and the loss of each step.

    Raises:
      ValueError: rate <= 0, l1 < 0 or bound <= 0.
    """
    if rate <= 0 or l1 < 0 or (bound is not None and bound <= 0):
        raise ValueError(
            f"rate, l1, bound: got {rate}, {l1}, {bound}, expected > 0, >= 0 and > 0 or None"
        )
    optimizer = optax.adam(rate)
    slope = jax.value_and_grad(penalised(loss, gathered, l1, fn))

    def step(carry: Tree, batch: Batch) -> tuple[Dynamic, Array]:
        c, state = carry
        value, g = slope(c, batch)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optimizer.update(g, state, c)
        c = optax.apply_updates(c, updates)
        return (_project(c, bound), state), value

    (c, _), values = lax.scan(step, (start, optimizer.init(start)), batches)
    return Learned(mixed(gathered, c, fn), c, values)


def _project(coefficients: Dynamic, bound: float | None) -> Dynamic:
    if bound is None:
        return coefficients
    return jax.tree.map(lambda t: jnp.clip(t, -bound, bound), coefficients)


SYSTEM = System(
    name="Coefficients by gradient",
    paper="Yang 2023, 2310.02575",
    symbol="learn",
    evidence="derivatives against differences and dense merging; no dense product; recovers the "
    "truth",
    kind="component",
)

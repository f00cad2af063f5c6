r"""Soups: weighted averages of adapters, the baseline every generator has to face.

Every interpolating baseline of this folder (soup, mean adapter, nearest, softmax-weighted,
kernel ridge, span projection) is one matrix of weights ``w`` with rows that sum to one:

.. math:: \Delta_m = \sum_n w_{mn} \Delta_n .

Symbols: :math:`w` is ``weights`` [m, n] over the n training adapters, :math:`\Delta_n` the delta
of adapter n. Three ways to form the sum, by what the adapters share:

* ``combine``: averages the factors themselves. Exact in delta space when all other factors are
  shared (one frozen ``a``, only ``b`` trained: the delta is linear in ``b``); otherwise it is the
  mean of factors, a different adapter. ``require_shared`` is the check.
* ``jlora.algebra.combine``: exact for any adapters by concatenation, the rank grows to n R.
* ``delta_soups``: the best rank-k approximation of that exact sum, with its error.

Paper: Wortsman et al., Model soups, 2022 (the averaging).
Deviates: soups there average full weights, here deltas.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jlora import algebra
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.system import System

# Differences of inner products lose half the digits: full precision on every device.
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def mean_weights(n: int, dtype: DTypeLike = jnp.float32) -> Float[Array, "1 n"]:
    """Weights of the mean adapter: every training adapter alike.

    Args:
      n: number of adapters.
      dtype: of the weights.

    Returns:
      [1, n].
    """
    return jnp.full((1, n), 1.0 / n, dtype)


def task_weights(
    groups: Int[Array, "n"], tasks: int, dtype: DTypeLike = jnp.float32
) -> Float[Array, "tasks n"]:
    """Weights of one soup per task.

    Args:
      groups: [n] task index of each adapter, in ``range(tasks)``.
      tasks: number of tasks (static).
      dtype: of the weights.

    Returns:
      [tasks, n]; row g is uniform over the adapters of task g. A task without adapters gives NaN
      (0 / 0): there is no soup of nothing.
    """
    member = (groups[None, :] == jnp.arange(tasks, dtype=groups.dtype)[:, None]).astype(dtype)
    return member / jnp.sum(member, axis=1, keepdims=True)


def combine(weights: Float[Array, "m n"], values: PyTree) -> PyTree:
    """Weighted sums over the leading axis of every leaf.

    Args:
      weights: [m, n].
      values: PyTree of leaves [n, ...], e.g. ``bank.trainable`` or tokens [n, T, D].

    Returns:
      PyTree of leaves [m, ...], dtypes of the leaves kept (sums accumulate in float32 or wider).

    Raises:
      ValueError: a leaf whose leading axis is not n, by path.
    """
    n = weights.shape[1]

    def one(path, leaf):
        if leaf.ndim < 1 or leaf.shape[0] != n:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"combine: leaf {name} has shape {leaf.shape}, expected ({n}, ...)")
        wide = leaf.dtype if leaf.dtype.itemsize > 4 else jnp.float32
        total = matmul(weights.astype(wide), leaf.astype(wide).reshape(n, -1))
        return total.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, values)


def require_shared(frozen: PyTree) -> None:
    """Refuses a bank whose frozen factors differ between adapters (host check, concrete arrays).

    Args:
      frozen: PyTree of leaves [n, ...], ``bank.frozen``.

    Raises:
      ValueError: names the first leaf that differs along its leading axis: there ``combine`` of
        the trained factors would not be the mean of the deltas.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        leaf = np.asarray(leaf)
        differs = np.any(leaf != leaf[:1], axis=tuple(range(1, leaf.ndim)))
        if differs.any():
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"frozen leaf {name} of adapter {int(np.argmax(differs))} differs from adapter 0: "
                "expected one shared factor; use delta_soups"
            )


def delta_soups(
    bank: Adapter | algebra.Deltas, weights: Float[Array, "m n"], rank: int
) -> algebra.Truncated:
    r"""Weighted sums of deltas, cut to rank ``rank``: exact where the sum has no higher rank.

    .. math:: \Delta_m = \mathrm{trunc}_k\,[w_{m1} u_1, \dots, w_{mn} u_n]\,[v_1; \dots; v_n] .

    Args:
      bank: bank of n adapters, or its deltas {path: LowRank of [n, *stack, ...]}.
      weights: [m, n].
      rank: kept rank k (static); n R or min(d_in, d_out) loses nothing.

    Returns:
      Truncated with leading axis m: deltas {path: (u [m, *stack, d_in, k], v [m, *stack, k,
      d_out])}, errors {path: [m, *stack]} and total [m], the exact norms of what was cut off.
    """
    return jax.lax.map(lambda w: algebra.truncate(algebra.combine(bank, w), rank), weights)


def squared_error(
    weights: Float[Array, "m n"],
    gram: Float[Array, "n n"],
    cross: Float[Array, "m n"],
    squared_norms: Float[Array, "m"],
) -> Float[Array, "m"]:
    r"""Squared distance of targets to weighted sums of adapters, from inner products alone.

    .. math:: \|\Delta_m - \sum_n w_{mn}\Delta_n\|^2 = \|\Delta_m\|^2 - 2 w_m c_m + w_m G w_m^T .

    Args:
      weights: of the sums.
      gram: :math:`G` of the training deltas.
      cross: :math:`c` of targets with training deltas.
      squared_norms: of the targets.

    Returns:
      [m], rounding below zero cut off.
    """
    fit = jnp.sum(matmul(weights, gram) * weights, axis=1)
    return jnp.maximum(squared_norms - 2 * jnp.sum(weights * cross, axis=1) + fit, 0)


class Examples(NamedTuple):
    """A bank and the conditions of its tasks: the state of generators that interpolate."""

    conditions: Float[Array, "tasks E"]  # of each task, the mean over its adapters
    soups: Adapter  # bank of one soup per task; what is frozen is shared


def examples(conditions: Float[Array, "n E"], tasks: Int[Array, "n"], bank: Adapter) -> Examples:
    """One soup and one condition per task.

    Args:
      conditions: of each adapter.
      tasks: of each adapter, in any numbering.
      bank: n adapters that differ in what is trained alone.

    Returns:
      `Examples`, tasks in the order of their numbers.

    Raises:
      ValueError: a frozen factor that differs between adapters, or a condition that is not finite.
    """
    require_shared(bank.frozen)
    if not np.isfinite(np.asarray(conditions)).all():
        raise ValueError("conditions: got numbers that are not finite")
    numbers, groups = np.unique(np.asarray(tasks), return_inverse=True)
    weights = task_weights(jnp.asarray(groups, jnp.int32), len(numbers), conditions.dtype)
    frozen = jax.tree.map(lambda t: t[: len(numbers)], bank.frozen)
    soups = bank.replace(trainable=combine(weights, bank.trainable), frozen=frozen)
    return Examples(matmul(weights, conditions), soups)


def mixed(weights: Float[Array, "1 tasks"], soups: Adapter) -> Adapter:
    """One adapter: the weighted sum of a bank that shares what is frozen.

    Args:
      weights: one row.
      soups: the bank.

    Returns:
      An adapter like those of the bank.
    """
    trainable = jax.tree.map(lambda t: t[0], combine(weights, soups.trainable))
    return soups.replace(trainable=trainable, frozen=jax.tree.map(lambda t: t[0], soups.frozen))


def fit(
    key: PRNGKeyArray, conditions: Float[Array, "n E"], tasks: Int[Array, "n"], bank: Adapter
) -> Examples:
    """What the mean adapter needs.

    Args:
      key: not used.
      conditions: of each adapter; their width is checked, their values count in nothing.
      tasks: of each adapter.
      bank: n adapters.

    Returns:
      One soup and condition per task.

    Raises:
      ValueError: a bank or conditions that `examples` refuses.
    """
    del key
    return examples(conditions, tasks, bank)


def generate(key: PRNGKeyArray, state: Examples, condition: Float[Array, "E"]) -> Adapter:
    """The mean of all tasks' soups, whatever the condition: what a generator has to beat first.

    Args:
      key: not used.
      state: of `fit`.
      condition: checked, and not used.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    checked(condition, state.conditions.shape[1])
    return mixed(mean_weights(state.conditions.shape[0], condition.dtype), state.soups)


_SOUPS = System(
    name="Adapter soups",
    paper="Wortsman 2022, 2203.05482",
    symbol="delta_soups",
    claim="soups",
    evidence="exact at full rank, certified below; mutation check",
    kind="composition",
)
_MEAN = Generator(
    name="Mean adapter",
    paper="none (baseline)",
    symbol="generate",
    evidence="the mean over tasks by numpy",
    kind="component",
    breaks={"conditioned": "it is the same adapter for every condition"},
    fit=fit,
    generate=generate,
    orderless=True,
)
SYSTEMS = (_SOUPS, _MEAN)

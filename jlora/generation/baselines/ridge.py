r"""Kernel ridge from a condition to an adapter: the bar for every generator on unseen tasks.

Symbols: :math:`x_i` are the rows of ``conditions`` [n, E], :math:`y_i` the adapters (any linear
coordinates of the deltas: tokens, or ``b`` under a shared ``a``), :math:`K` the kernel matrix,
:math:`\lambda` is ``penalty``, :math:`H = I - 11^T/n`. With an unpenalised intercept

.. math:: P = H (HKH + \lambda I)^{-1} H, \qquad
    \hat y(q) = w(q)^T Y, \qquad w(q) = \tfrac1n 1 + P\,(k(q) - \tfrac1n K 1).

So a prediction is an affine combination of the training adapters: ``weights`` returns the rows
:math:`w(q)` for ``soup.combine`` and never touches :math:`Y`. Leaving out a whole block B of rows
(all adapters of one task) has a closed form, :math:`e_B = P_{BB}^{-1} (PY)_B`; for all tasks at
once

.. math:: E = R\,Y, \qquad R = (P \circ S)^{-1} P, \qquad S_{ij} = [\text{task}_i = \text{task}_j],

with squared error :math:`\mathrm{tr}(R G R^T)` from the Gram matrix :math:`G = YY^T` alone, hence
in delta space whatever the coordinates. ``choose`` minimises it on the training tasks.

Paper: Saunders et al., Ridge regression in dual variables, 1998; Cawley and Talbot, 2004
(leave-one-out of LS-SVM).
Original to jlora; the block form is tested against a refit for every task.
Deviates: blocks are tasks, not rows.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jlora import algebra, numerics
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.baselines import soup
from jlora.generation.baselines.soup import matmul

KINDS = ("linear", "cosine", "rbf")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Kernel:
    """linear x.y; cosine x.y/(|x||y|); rbf exp(-|x-y|^2 / (2 width^2))."""

    kind: str = "linear"
    width: float = 1.0  # rbf only, in the units of the conditions

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kernel kind {self.kind!r}, expected one of {KINDS}")
        if not self.width > 0:
            raise ValueError(f"kernel width {self.width}, expected > 0")

    def __call__(self, x: Float[Array, "m E"], y: Float[Array, "n E"]) -> Float[Array, "m n"]:
        """Kernel matrix [m, n] of the rows of x and y."""
        return _matrix(self.kind, self.width, x, y)


def _matrix(kind, width, x, y):  # the width may be traced
    inner = matmul(x, y.T)
    if kind == "linear":
        return inner
    xx, yy = jnp.sum(x**2, axis=1)[:, None], jnp.sum(y**2, axis=1)[None, :]
    if kind == "cosine":
        return inner / jnp.sqrt(xx * yy)
    return jnp.exp(-jnp.maximum(xx + yy - 2 * inner, 0) / (2 * width**2))


class Ridge(NamedTuple):
    """A fitted ridge: everything but the adapters themselves."""

    conditions: Float[Array, "n E"]  # training conditions
    smoother: Float[Array, "n n"]  # P
    kernel_mean: Float[Array, "n"]  # K 1 / n


class Choice(NamedTuple):
    """What ``choose`` settled on."""

    kernel: Kernel
    penalty: float  # absolute lambda
    error: float  # leave-one-task-out squared error over that of the mean (1 = useless)
    tried: tuple[tuple[Kernel, float, float], ...]  # every (kernel, penalty, error)


def smoother(
    kernel_matrix: Float[Array, "n n"], penalty: float | Float[Array, ""]
) -> Float[Array, "n n"]:
    """P, which makes weights of kernel values; symmetric, rows sum to zero.

    Args:
      kernel_matrix: K of the training conditions.
      penalty: lambda > 0.

    Returns:
      [n, n].
    """
    return _smoother(*_spectrum(kernel_matrix), penalty)


def _spectrum(kernel_matrix):
    """Eigenvalues [n] of HKH and its eigenvectors, centred [n, n]: once per kernel."""
    n = kernel_matrix.shape[0]
    centre = jnp.eye(n, dtype=kernel_matrix.dtype) - 1.0 / n
    values, vectors = numerics.eigh(matmul(matmul(centre, kernel_matrix), centre))
    # HKH is positive semi-definite: what is below zero is rounding.
    return jnp.maximum(values, 0), matmul(centre, vectors)


def _smoother(values, basis, penalty):
    denominator = values + jnp.asarray(penalty, values.dtype)
    return matmul(basis / denominator[None, :], basis.T)


def fit(kernel: Kernel, conditions: Float[Array, "n E"], penalty: float) -> Ridge:
    """Fits on the training conditions.

    Args:
      kernel: the kernel (static).
      conditions: [n, E], one row per training adapter (or task soup).
      penalty: absolute ridge penalty, > 0.

    Returns:
      Ridge state.

    Raises:
      ValueError: conditions that are not a matrix.
    """
    if conditions.ndim != 2:
        raise ValueError(f"ridge.fit: conditions {conditions.shape}, expected [n, E]")
    matrix = kernel(conditions, conditions)
    return Ridge(conditions, smoother(matrix, penalty), jnp.mean(matrix, axis=1))


def weights(kernel: Kernel, state: Ridge, query: Float[Array, "m E"]) -> Float[Array, "m n"]:
    """The rows of weights of predictions.

    Args:
      kernel: that of the fit.
      state: of `fit`.
      query: conditions of m tasks.

    Returns:
      [m, n] over the training rows; each row sums to one.
    """
    centred = kernel(query, state.conditions) - state.kernel_mean[None, :]
    return 1.0 / len(state.kernel_mean) + matmul(centred, state.smoother)


def predict(kernel: Kernel, state: Ridge, values: PyTree, query: Float[Array, "m E"]) -> PyTree:
    """Predicted adapters.

    Args:
      kernel: that of the fit.
      state: of `fit`.
      values: training adapters, leaves [n, ...].
      query: conditions of m tasks.

    Returns:
      Leaves [m, ...].
    """
    return soup.combine(weights(kernel, state, query), values)


def residual_map(p: Float[Array, "n n"], groups: Int[Array, "n"]) -> Float[Array, "n n"]:
    """R: ``R @ Y`` are the leave-one-task-out residuals.

    Args:
      p: of `smoother`.
      groups: task of each row; at least two different ones.

    Returns:
      [n, n].
    """
    same = (groups[:, None] == groups[None, :]).astype(p.dtype)
    return numerics.solve(p * same, p)


def leave_out_weights(state: Ridge, groups: Int[Array, "n"]) -> Float[Array, "n n"]:
    """Weights of each training row's prediction from all OTHER tasks: zero on its own task.

    Args:
      state: a fit on all n rows.
      groups: task of each row.

    Returns:
      [n, n]; rows sum to one. Equal to refitting without the task, for every task.
    """
    eye = jnp.eye(groups.shape[0], dtype=state.smoother.dtype)
    return eye - residual_map(state.smoother, groups)


@partial(jax.jit, static_argnames="kind")
def _errors(kind, width, conditions, gram, groups, scales):
    """Relative leave-one-task-out errors [s] and absolute penalties [s] for relative ``scales``."""
    n = groups.shape[0]
    matrix = _matrix(kind, width, conditions, conditions)
    centre = jnp.eye(n, dtype=gram.dtype) - 1.0 / n
    unit = jnp.trace(matmul(centre, matrix)) / n
    spectrum = _spectrum(matrix)
    total = jnp.trace(matmul(centre, gram))

    def one(scale):
        residuals = residual_map(_smoother(*spectrum, scale * unit), groups)
        return jnp.sum(matmul(residuals, gram) * residuals) / total

    return jax.lax.map(one, scales), scales * unit


def choose(
    conditions: Float[Array, "n E"],
    gram: Float[Array, "n n"],
    groups: Int[Array, "n"],
    *,
    kinds: Sequence[str] = KINDS,
    widths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
) -> Choice:
    """Kernel and penalty of least leave-one-task-out error, from the training tasks alone.

    Args:
      conditions: [n, E] of the training rows.
      gram: [n, n] inner products of their deltas.
      groups: [n] task of each row; at least two different ones.
      kinds: kernels tried.
      widths: rbf widths, in units of the median distance between different conditions.
      penalties: in units of trace(HKH)/n, so that one grid serves every kernel.

    Returns:
      Choice; ties go to the first tried.

    Raises:
      ValueError: shapes that disagree, a single task, an empty grid, or an error that is not
        finite (the kernel and the penalties are named).
    """
    n = conditions.shape[0]
    if gram.shape != (n, n) or groups.shape != (n,):
        raise ValueError(
            f"ridge.choose: conditions {conditions.shape}, gram {gram.shape}, groups "
            f"{groups.shape}; expected [n, E], [n, n], [n]"
        )
    if len(np.unique(np.asarray(groups))) < 2:
        raise ValueError("ridge.choose needs at least two tasks to leave one out")
    if not (kinds and widths and penalties) or min(*penalties, *widths) <= 0:
        raise ValueError(
            f"ridge.choose: empty or non-positive grid {kinds=} {widths=} {penalties=}"
        )
    unit = median_distance(conditions)
    kernels = [Kernel(k) for k in kinds if k != "rbf"]
    if "rbf" in kinds:
        kernels += [Kernel("rbf", width * unit) for width in widths]
    tried = []
    for kernel in kernels:
        width, scales = jnp.asarray(kernel.width, gram.dtype), jnp.asarray(penalties, gram.dtype)
        errors, absolute = _errors(kernel.kind, width, conditions, gram, groups, scales)
        if not np.isfinite(np.asarray(errors)).all():
            raise ValueError(f"{kernel}: leave-one-task-out errors {errors} are not finite")
        tried += [(kernel, float(p), float(e)) for p, e in zip(absolute, errors, strict=True)]
    best = min(tried, key=lambda row: row[2])
    return Choice(best[0], best[1], best[2], tuple(tried))


def median_distance(conditions: Float[Array, "n E"]) -> float:
    """Median distance between rows that differ.

    Args:
      conditions: of the training rows, concrete: the result becomes a static width.

    Returns:
      A Python float.

    Raises:
      ValueError: all conditions are equal.
    """
    x = np.asarray(conditions, np.float64)
    square = np.sum(x**2, axis=1)
    distance = np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * x @ x.T, 0))
    apart = distance[distance > 1e-6 * np.sqrt(square.max())]
    if apart.size == 0:
        raise ValueError("all conditions are equal: there is nothing to regress on")
    return float(np.median(apart))


class RidgeGenerator(NamedTuple):
    """The state of the generator."""

    kernel: Kernel  # static
    ridge: Ridge  # over one condition per task
    soups: Adapter  # bank of one soup per task


def learn(
    key: PRNGKeyArray, conditions: Float[Array, "n E"], tasks: Int[Array, "n"], bank: Adapter
) -> RidgeGenerator:
    """The soups of all tasks, with kernel and penalty by leave-one-task-out error.

    Args:
      key: not used.
      conditions: of each adapter.
      tasks: of each adapter; at least two different ones.
      bank: n adapters that differ in what is trained alone.

    Returns:
      Kernel, fit and one soup per task.

    Raises:
      ValueError: as `soup.examples` and `choose` do.
    """
    del key
    train = soup.examples(conditions, tasks, bank)
    groups = jnp.arange(len(train.conditions), dtype=jnp.int32)
    best = choose(train.conditions, algebra.gram(train.soups), groups)
    fitted = fit(best.kernel, train.conditions, best.penalty)
    return RidgeGenerator(best.kernel, fitted, train.soups)


def generate(key: PRNGKeyArray, state: RidgeGenerator, condition: Float[Array, "E"]) -> Adapter:
    """The adapter that ridge predicts.

    Args:
      key: not used.
      state: of `learn`.
      condition: of the new task.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    query = checked(condition, state.ridge.conditions.shape[1])[None]
    return soup.mixed(weights(state.kernel, state.ridge, query), state.soups)


SYSTEM = Generator(
    name="Kernel ridge from condition to adapter",
    paper="Saunders 1998; Cawley 2004",
    symbol="choose",
    evidence="leave-one-task-out against a refit loop; limits",
    kind="component",
    fit=learn,
    generate=generate,
    orderless=True,
)

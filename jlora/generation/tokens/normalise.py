r"""Normalisation of tokens, fitted on training adapters only, and the leaky one of the paper.

x' = (x - mean) / scale, and back. With x of n training adapters, token t of type k(t):

.. math::
    \text{site\_rms:}\quad & m_t = \tfrac1n \sum_i x_{it},\quad
        s_t^2 = \mathrm{mean}_{i,\, u : k(u) = k(t),\, d\ \text{unpadded}} (x_{iud} - m_{ud})^2, \\
    \text{coordinate:}\quad & m_{td} = \tfrac1n \sum_i x_{itd},\quad
        s_{td}^2 = \tfrac1n \sum_i (x_{itd} - m_{td})^2, \\
    \text{task:}\quad & \text{as coordinate, but over the adapters of one task } q \text{ only.}

`site_rms` (a token type has one scale) keeps the shape of the deltas; `coordinate` whitens noise
and signal alike. `task` is what the published Cond P-Diff language code does, and it leaks: the
mean of task q is the soup of its adapters, so at sampling time a *zero* latent already decodes to
that soup, whatever the condition says. It is here to show that, not to be used: it also cannot
normalise a task that it was not fitted on.

No scale is below `floor` times the root mean square of x, so that the rounding error of a constant
coordinate is not blown up, nor a unit latent there decoded to more than that.

Source: `task` is Cond P-Diff's (arXiv 2408.01415) z-score as its released code computes it; the
global modes are original to jlora, like the global mean and std of Text-to-LoRA (arXiv 2506.06105).
Deviates: population standard deviation (divisor n), and the floor.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MODES = ("site_rms", "coordinate", "task")


class Normaliser(NamedTuple):
    """Statistics. Global modes have [T, D] arrays, mode "task" has [K, T, D], a row per task id."""

    mean: Array  # [T, D] or [K, T, D]
    scale: Array  # [T, 1] (site_rms), [T, D] (coordinate) or [K, T, D] (task)


def fit(
    mode: str,
    x: Float[Array, "n T D"],
    *,
    mask: np.ndarray | None = None,
    types: np.ndarray | None = None,
    tasks: Int[np.ndarray, " n"] | None = None,
    floor: float = 1e-6,
) -> Normaliser:
    """Statistics of training adapters. Give no held-out adapter to it.

    Args:
      mode: "site_rms", "coordinate" or "task".
      x: [n, T, D] tokens.
      mask: bool [T, D], False in the padding (`TokenSpec.mask`); None: no padding.
      types: int [T], the type of each token (`TokenSpec.types`), for "site_rms"; None: every
        token is a type of its own.
      tasks: int [n], the task id 0 .. K-1 of each adapter, for "task".
      floor: smallest scale relative to the root mean square of x.

    Returns:
      A `Normaliser` of x's dtype.

    Raises:
      ValueError: unknown mode, wrong shapes, missing task ids, ids without adapters, or a value
        that is not finite (names the adapter).
    """
    if mode not in MODES:
        raise ValueError(f"unknown normalisation {mode!r}, expected one of {MODES}")
    if x.ndim != 3 or x.shape[0] == 0:
        raise ValueError(f"x: got shape {x.shape}, expected [n > 0, T, D]")
    check_finite(x)
    n, length, dim = x.shape
    if (mode == "task") != (tasks is not None):
        raise ValueError(f"{mode}: mode 'task' requires task ids; no other mode takes them")
    if tasks is not None:
        ids = np.asarray(tasks)
        if ids.shape != (n,) or set(ids.tolist()) != set(range(ids.max() + 1)):
            raise ValueError(f"tasks: expected {n} ids covering 0 .. K-1, got {ids.tolist()}")
        rows = [_moments(x[ids == q]) for q in range(ids.max() + 1)]
        mean, var = (jnp.stack(part) for part in zip(*rows, strict=True))
    else:
        mean, var = _moments(x)
    mask = np.ones((length, dim), bool) if mask is None else np.asarray(mask)
    if mask.shape != (length, dim):
        raise ValueError(f"mask: got {mask.shape}, expected {(length, dim)}")
    weight = jnp.asarray(mask, x.dtype)
    least = floor * jnp.sqrt(jnp.sum(jnp.square(x)) / (jnp.sum(weight) * n))
    if mode == "site_rms":
        types = np.arange(length) if types is None else np.asarray(types)
        if types.shape != (length,):
            raise ValueError(f"types: got {types.shape}, expected {(length,)}")
        same = jnp.asarray(types[:, None] == types[None, :], x.dtype)  # [T, T]
        var = same @ jnp.sum(var * weight, 1) / (same @ jnp.sum(weight, 1))
        var = var[:, None]  # [T, 1]
    scale = jnp.maximum(jnp.sqrt(var), least)
    # Only tokens that are all zero have no scale at all.
    return Normaliser(mean, jnp.where(scale > 0, scale, jnp.ones_like(scale)))


def _moments(x: Array) -> tuple[Array, Array]:
    # Two passes: E[x^2] - E[x]^2 loses all digits where snapshots of one run differ by 1e-3.
    mean = jnp.mean(x, axis=0)
    return mean, jnp.mean(jnp.square(x - mean[None]), axis=0)


def apply(
    norm: Normaliser, x: Float[Array, "T D"], task: Int[Array, ""] | int | None = None
) -> Float[Array, "T D"]:
    """Normalised tokens of one adapter.

    Args:
      norm: the statistics.
      x: tokens.
      task: its id, of a normaliser of mode "task" alone.

    Returns:
      (x - mean) / scale.

    Raises:
      ValueError: a task id that is missing, or one that is not wanted.
    """
    mean, scale = _rows(norm, task)
    return (x - mean) / scale


def invert(
    norm: Normaliser, x: Float[Array, "T D"], task: Int[Array, ""] | int | None = None
) -> Float[Array, "T D"]:
    """Tokens of normalised ones: the inverse of `apply`.

    Args:
      norm: the statistics.
      x: normalised tokens of one adapter.
      task: as in `apply`.

    Returns:
      x scale + mean.

    Raises:
      ValueError: a task id that is missing, or one that is not wanted.
    """
    mean, scale = _rows(norm, task)
    return x * scale + mean


def _rows(norm: Normaliser, task: Array | int | None) -> tuple[Array, Array]:
    if (norm.mean.ndim == 3) != (task is not None):
        raise ValueError("a normaliser of mode 'task' requires a task id; no other takes one")
    mean, scale = norm if task is None else (norm.mean[task], norm.scale[task])
    return mean, jnp.broadcast_to(scale, mean.shape)


def check_finite(x: Float[Array, "n T D"]) -> None:
    """Refuses adapters that hold a NaN or infinity; does nothing under tracing.

    Args:
      x: tokens of n adapters.

    Raises:
      ValueError: names the adapters.
    """
    if isinstance(x, jax.core.Tracer):
        return
    bad = np.flatnonzero(~np.isfinite(np.asarray(x)).all(axis=(1, 2)))
    if bad.size:
        raise ValueError(f"adapters {bad.tolist()} of {x.shape[0]} hold values that are not finite")

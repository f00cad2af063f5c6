r"""What a denoiser predicts, and exact conversions between the four kinds.

At a given (z, t) on a path, data x and noise determine each other, and every kind is an affine
function of either:

.. math::
    z = \alpha x + \sigma \epsilon,\qquad v = \alpha \epsilon - \sigma x,\qquad
    u = \dot z = \dot\alpha x + \dot\sigma \epsilon

====  ==================================  ==========================================
kind  data x from it                      noise from it
====  ==================================  ==========================================
eps   (z - sigma eps) / alpha             eps
x0    x0                                  (z - alpha x0) / sigma
v     (alpha z - sigma v) / (a^2 + s^2)   (sigma z + alpha v) / (a^2 + s^2)
vel.  (s' z - sigma u) / w                (alpha u - a' z) / w,  w = alpha s' - sigma a'
====  ==================================  ==========================================

Symbols: :math:`\epsilon` -> ``eps``, x -> ``x0``, v -> ``v``, u -> ``velocity``.
Shapes: ``value``, ``z`` and results [...] of one example (all equal), t scalar, float32.
Raises: ValueError for an unknown kind.
Papers: Ho et al. 2020 (eps); Salimans and Ho 2022 (v); Lipman et al. 2023 (velocity).
Source: papers; v on paths with alpha^2 + sigma^2 != 1 is original to jlora.
Deviates: nothing is clamped: eps at alpha = 0, x0 at sigma = 0 have no inverse and give inf or nan
(the samplers refuse such a start when they are built).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.generation.diffusion.paths import Path

KINDS = ("eps", "x0", "v", "velocity")


def check_kind(kind: str) -> None:
    """Refuses an unknown kind of prediction.

    Args:
      kind: the name.

    Raises:
      ValueError: not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"prediction kind: got {kind!r}, expected one of {KINDS}")


def target(
    path: Path, kind: str, x0: Float[Array, "..."], eps: Float[Array, "..."], t: Float[Array, ""]
) -> Float[Array, "..."]:
    """The value of a kind when data and noise are known.

    Args:
      path: the noise schedule.
      kind: one of `KINDS`.
      x0: data.
      eps: noise.
      t: time.

    Returns:
      The shape of x0.

    Raises:
      ValueError: an unknown kind.
    """
    check_kind(kind)
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        alpha, sigma = path(t)
        return alpha * eps - sigma * x0
    alpha_rate, sigma_rate = path.rates(t)
    return alpha_rate * x0 + sigma_rate * eps


def estimates(
    path: Path, kind: str, value: Float[Array, "..."], z: Float[Array, "..."], t: Float[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Data and noise that a prediction implies.

    Args:
      path: the noise schedule.
      kind: what is predicted, one of `KINDS`.
      value: the prediction at (z, t).
      z: the noisy sample.
      t: its time.

    Returns:
      (x0, eps), of the shape of z.

    Raises:
      ValueError: an unknown kind.
    """
    check_kind(kind)
    alpha, sigma = path(t)
    if kind == "eps":
        return (z - sigma * value) / alpha, value
    if kind == "x0":
        return value, (z - alpha * value) / sigma
    if kind == "v":
        square = alpha * alpha + sigma * sigma
        return (alpha * z - sigma * value) / square, (sigma * z + alpha * value) / square
    alpha_rate, sigma_rate = path.rates(t)
    wronskian = alpha * sigma_rate - sigma * alpha_rate
    x0 = (sigma_rate * z - sigma * value) / wronskian
    return x0, (alpha * value - alpha_rate * z) / wronskian


def convert(
    path: Path,
    source: str,
    goal: str,
    value: Float[Array, "..."],
    z: Float[Array, "..."],
    t: Float[Array, ""],
) -> Float[Array, "..."]:
    """A prediction expressed as another kind.

    Args:
      path: the noise schedule.
      source: kind of `value`.
      goal: kind of the result.
      value: the prediction at (z, t).
      z: the noisy sample.
      t: its time.

    Returns:
      The shape of z.

    Raises:
      ValueError: an unknown kind.
    """
    x0, eps = estimates(path, source, value, z, t)
    return target(path, goal, x0, eps, t)


def error_ratio(path: Path, kind: str, t: Float[Array, ""]) -> Float[Array, ""]:
    """Squared error in a kind over squared error in x0 at one (z, t): what min-SNR divides by.

    Args:
      path: the noise schedule.
      kind: one of `KINDS`.
      t: time.

    Returns:
      scalar.

    Raises:
      ValueError: an unknown kind.
    """
    check_kind(kind)
    alpha, sigma = path(t)
    if kind == "x0":
        return jnp.ones_like(alpha)
    if kind == "eps":
        return (alpha / sigma) ** 2
    if kind == "v":
        return ((alpha * alpha + sigma * sigma) / sigma) ** 2
    alpha_rate, sigma_rate = path.rates(t)
    return ((alpha * sigma_rate - sigma * alpha_rate) / sigma) ** 2

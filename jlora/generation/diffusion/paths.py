r"""Noise schedules: straight interpolations from data (t = 0) to Gaussian noise (t = 1).

.. math:: z_t = \alpha(t)\, x + \sigma(t)\, \epsilon, \quad \epsilon \sim N(0, I),\ t \in [0, 1]

Symbols: x -> ``x``, :math:`\epsilon` -> ``noise``, :math:`\alpha, \sigma` -> ``path.alpha``,
``path.sigma``, T -> ``steps``, :math:`\beta_i` -> the linear table.

==============  ==========================================  =============================
path            :math:`\alpha(t)`                            :math:`\sigma(t)`
==============  ==========================================  =============================
ddpm_linear     :math:`\prod_{i\le tT}(1-\beta_i)^{1/2}`      :math:`\sqrt{1-\alpha^2}`
cosine          :math:`\cos(\pi t/2)`                        :math:`\sin(\pi t/2)`
rectified_flow  :math:`1 - t`                               :math:`t`
==============  ==========================================  =============================

Shapes: t is a scalar (vmap for more), float32; alpha and sigma are scalars of the same dtype.
Raises: ValueError for an unknown name or an impossible table.
Papers: Ho et al. 2020 (linear table); Nichol and Dhariwal 2021, Salimans and Ho 2022 (cosine);
Liu et al. 2023 (rectified flow).
Source: papers.
Deviates: step i of the discrete table (1-based) sits at t = i / T, and log alpha is linear between
steps, so that discrete samplers and continuous ones share one path; the cosine path has no offset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]


@dataclass(frozen=True)
class Path:
    """One noise schedule; hashable, so a jitted function may take it as a static argument."""

    name: str  # for messages and reports
    alpha: Schedule  # weight of the data, 1 at t = 0
    sigma: Schedule  # weight of the noise, 0 at t = 0

    def __call__(self, t: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """alpha(t), sigma(t)."""
        return self.alpha(t), self.sigma(t)

    def mix(
        self, x: Float[Array, "..."], noise: Float[Array, "..."], t: Float[Array, ""]
    ) -> Float[Array, "..."]:
        """The noisy sample z_t = alpha(t) x + sigma(t) noise.

        Args:
          x: data.
          noise: of the shape of x.
          t: time.

        Returns:
          The shape of x.
        """
        alpha, sigma = self(t)
        return alpha * x + sigma * noise

    def rates(self, t: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The time derivatives of alpha and sigma.

        Args:
          t: time.

        Returns:
          d alpha / dt, d sigma / dt (infinite for sigma of ddpm_linear at t = 0).
        """
        one = jnp.ones_like(t)
        return jax.jvp(self.alpha, (t,), (one,))[1], jax.jvp(self.sigma, (t,), (one,))[1]


@cache
def ddpm_linear(steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 2e-2) -> Path:
    """The table of DDPM and of Cond P-Diff: beta rises linearly over the steps.

    Args:
      steps: T; this and the next two are DDPM's.
      beta_min: of the first step.
      beta_max: of the last step.

    Returns:
      The path.

    Raises:
      ValueError: no steps, or betas outside 0 < beta_min <= beta_max < 1.
    """
    if steps < 1 or not 0.0 < beta_min <= beta_max < 1.0:
        raise ValueError(
            f"ddpm_linear: got steps={steps}, beta_min={beta_min}, beta_max={beta_max}; "
            "expected steps >= 1 and 0 < beta_min <= beta_max < 1"
        )
    beta = np.linspace(beta_min, beta_max, steps)
    table = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-beta))]).astype(np.float32)

    def log_alpha(t):
        place = t * jnp.asarray(steps, t.dtype)
        low = jnp.clip(jnp.floor(place), 0, steps - 1)
        index = low.astype(jnp.int32)
        left, right = jnp.asarray(table, t.dtype)[index], jnp.asarray(table, t.dtype)[index + 1]
        return left + (place - low) * (right - left)

    return Path(
        "ddpm_linear",
        alpha=lambda t: jnp.exp(log_alpha(t)),
        # expm1: 1 - alpha^2 loses all digits near t = 0.
        sigma=lambda t: jnp.sqrt(-jnp.expm1(2.0 * log_alpha(t))),
    )


@cache
def cosine() -> Path:
    """The quarter circle: alpha^2 + sigma^2 = 1 and alpha(1) = 0 exactly.

    Returns:
      The path.
    """
    quarter = float(np.pi / 2)
    return Path(
        "cosine",
        alpha=lambda t: jnp.sin(quarter * (1.0 - t)),  # cos(pi t / 2), exactly 0 at t = 1
        sigma=lambda t: jnp.sin(quarter * t),
    )


@cache
def rectified_flow() -> Path:
    """The straight line between data and noise; its velocity is noise - x at every t.

    Returns:
      The path.
    """
    return Path("rectified_flow", alpha=lambda t: 1.0 - t, sigma=lambda t: t)


PATHS: dict[str, Callable[[], Path]] = {
    "ddpm_linear": ddpm_linear,
    "cosine": cosine,
    "rectified_flow": rectified_flow,
}


def path(name: str) -> Path:
    """The path of a name, with its default table.

    Args:
      name: one of `PATHS`.

    Returns:
      The path.

    Raises:
      ValueError: an unknown name.
    """
    if name not in PATHS:
        raise ValueError(f"path: got {name!r}, expected one of {sorted(PATHS)}")
    return PATHS[name]()

r"""From noise to data: DDPM, DDIM, Euler and Heun on any path, from one prediction per step.

Let x, e be the data and noise that the prediction at (z, t) implies and s < t the next time; a, b
abbreviate :math:`\alpha, \sigma`.

.. math::
    a_{ts} &= a_t / a_s, \qquad b_{ts}^2 = b_t^2 - a_{ts}^2 b_s^2
        \qquad\text{(the forward kernel from s to t)} \\
    \text{DDPM}:\quad z_s &= \frac{a_{ts} b_s^2}{b_t^2} z_t + \frac{a_s b_{ts}^2}{b_t^2} x
        + \tilde b\, n, \qquad \tilde b^2 = b_{ts}^2 \text{ (fixedlarge)},\
        b_s^2 b_{ts}^2 / b_t^2 \text{ (fixedsmall)} \\
    \text{DDIM}:\quad z_s &= a_s x + \sqrt{b_s^2 - c^2}\, e + c\, n,
        \qquad c = \eta\, b_s b_{ts} / b_t \\
    \text{flow}:\quad \frac{dy}{d\tau} &= e - x, \qquad y = \frac{z}{a + b},\
        \tau = \frac{b}{a + b}

The last step (s = 0) adds no noise. Euler takes one slope per step, Heun the mean of the slopes at
both ends (its last step is Euler, since x0 has no noise to divide by at s = 0).

Symbols: x, e -> ``x0``, ``eps``; n -> noise of the step; :math:`\eta` -> ``eta``.
Shapes: z of ``shape`` (one example), t scalar, float32; batches by vmap inside ``build``.
Raises: ValueError, when built, for unknown names, steps < 1, or a start that has no data estimate.
Papers: Ho et al. 2020; Song et al. 2021 (DDIM); Karras et al. 2022 (Heun); Liu et al. 2023.
Source: papers; the posterior of paths that do not preserve variance is original to jlora.
Deviates: the probability flow is integrated in (y, tau), in which every path is a rectified flow:
dz/dt itself is infinite at t = 0 on ddpm_linear. Euler so is DDIM with eta = 0, on every path.
Clipping x0 (off by default; Cond P-Diff clips at 1) also moves eps, so that z stays on its path.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.generation.diffusion.paths import Path
from jlora.generation.diffusion.predict import check_kind, estimates
from jlora.system import System
from jlora.types import Dynamic

METHODS = ("ddpm", "ddim", "euler", "heun")
VARIANCES = ("fixedlarge", "fixedsmall")


@dataclass(frozen=True)
class Sampler:
    """How to walk from noise to data."""

    method: str = "euler"  # one of METHODS
    steps: int = 20  # model evaluations (heun: 2 steps - 1)
    eta: float = 0.0  # ddim: 0 deterministic, 1 the ddpm posterior
    variance: str = "fixedlarge"  # ddpm: one of VARIANCES
    clip: float | None = None  # bound on |x0| at every step
    clip_state: bool = False  # also bound the state itself after every step
    start: float = 1.0  # time of the first step; the last ends at 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Sampler.method: got {self.method!r}, expected one of {METHODS}")
        if self.variance not in VARIANCES:
            raise ValueError(f"Sampler.variance: got {self.variance!r}, expected {VARIANCES}")
        if self.steps < 1:
            raise ValueError(f"Sampler.steps: got {self.steps}, expected at least 1")
        if not 0.0 < self.start <= 1.0 or not 0.0 <= self.eta <= 1.0:
            raise ValueError(
                f"Sampler: got start={self.start}, eta={self.eta}; "
                "expected 0 < start <= 1 and 0 <= eta <= 1"
            )
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(f"Sampler.clip: got {self.clip}, expected a positive bound or None")
        if self.clip_state and self.clip is None:
            raise ValueError("Sampler.clip_state: needs clip, got clip=None")


def transition(
    path: Path, t: Float[Array, ""], s: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The forward kernel z_t = a_ts z_s + b_ts n.

    Args:
      path: the noise schedule.
      t: the later time.
      s: the earlier one, s < t.

    Returns:
      a_ts, b_ts^2.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
    ratio = alpha_t / alpha_s
    return ratio, jnp.maximum(sigma_t**2 - (ratio * sigma_s) ** 2, 0.0)  # rounding only


def ddpm_step(
    path: Path,
    variance: str,
    z: Float[Array, "..."],
    x0: Float[Array, "..."],
    t: Float[Array, ""],
    s: Float[Array, ""],
    noise: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Ancestral step: a draw from q(z_s | z_t, x0), or with its variance widened to b_ts^2.

    Args:
      path: the noise schedule.
      variance: "fixedsmall" is the posterior's, "fixedlarge" the widened one.
      z: state at t.
      x0: data estimate.
      t: time of the state.
      s: next time, s < t.
      noise: standard normal.

    Returns:
      The state at s.
    """
    (alpha_s, sigma_s), sigma_t = path(s), path.sigma(t)
    ratio, kernel = transition(path, t, s)
    mean = (ratio * sigma_s**2 * z + alpha_s * kernel * x0) / sigma_t**2
    spread = kernel if variance == "fixedlarge" else sigma_s**2 * kernel / sigma_t**2
    return mean + jnp.where(s > 0.0, jnp.sqrt(spread), 0.0) * noise


def ddim_step(
    path: Path,
    eta: float,
    x0: Float[Array, "..."],
    eps: Float[Array, "..."],
    t: Float[Array, ""],
    s: Float[Array, ""],
    noise: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The non-Markovian step: same marginals, noise scaled by eta.

    Args:
      path: the noise schedule.
      eta: 0 is deterministic, 1 the ancestral step.
      x0: data estimate.
      eps: noise estimate.
      t: time of the state.
      s: next time, s < t.
      noise: standard normal.

    Returns:
      The state at s.
    """
    (alpha_s, sigma_s), sigma_t = path(s), path.sigma(t)
    _, kernel = transition(path, t, s)
    fresh = eta * sigma_s * jnp.sqrt(kernel) / sigma_t
    kept = jnp.sqrt(jnp.maximum(sigma_s**2 - fresh**2, 0.0))  # rounding only
    return alpha_s * x0 + kept * eps + fresh * noise


def flow_step(
    path: Path,
    z: Float[Array, "..."],
    slope: Float[Array, "..."],
    t: Float[Array, ""],
    s: Float[Array, ""],
) -> Float[Array, "..."]:
    """One explicit step of dy/dtau = slope, expressed in z.

    Args:
      path: the noise schedule.
      z: state at t.
      slope: e - x.
      t: time of the state.
      s: next time, s < t.

    Returns:
      The state at s.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
    size_t, size_s = alpha_t + sigma_t, alpha_s + sigma_s
    return size_s * (z / size_t + (sigma_s / size_s - sigma_t / size_t) * slope)


def sample(
    denoise: Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]],
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    path: Path,
    kind: str,
    config: Sampler,
    trajectory: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """One sample.

    Args:
      denoise: (z, t) -> prediction.
      key: of the start and of the steps' noise.
      shape: of z.
      path: the noise schedule.
      kind: what is predicted, one of `predict.KINDS`.
      config: the sampler.
      trajectory: whether to keep all states.

    Returns:
      The last state; and all states [steps + 1, *shape] with `trajectory`, else None.
    """
    bound = config.clip
    first, rest = jax.random.split(key)
    times = jnp.linspace(config.start, 0.0, config.steps + 1, dtype=jnp.float32)
    alpha, sigma = path(times[0])
    z = jnp.sqrt(alpha**2 + sigma**2) * jax.random.normal(first, shape, jnp.float32)

    def implied(z, t):
        x0, eps = estimates(path, kind, denoise(z, t), z, t)
        if bound is not None:
            x0 = jnp.clip(x0, -bound, bound)
            alpha, sigma = path(t)
            eps = (z - alpha * x0) / sigma
        return x0, eps

    def step(z, now):
        t, s, key = now
        x0, eps = implied(z, t)
        if config.method == "ddpm":
            z = ddpm_step(path, config.variance, z, x0, t, s, jax.random.normal(key, shape))
        elif config.method == "ddim":
            noise = jax.random.normal(key, shape) if config.eta else jnp.zeros(shape)
            z = ddim_step(path, config.eta, x0, eps, t, s, noise)
        elif config.method == "euler":
            z = flow_step(path, z, eps - x0, t, s)
        else:
            z = heun(z, eps - x0, t, s)
        if bound is not None and config.clip_state:
            z = jnp.clip(z, -bound, bound)
        return z, (z if trajectory else None)

    def heun(z, slope, t, s):
        ahead = flow_step(path, z, slope, t, s)

        def corrected():
            x0, eps = implied(ahead, s)
            return flow_step(path, z, 0.5 * (slope + eps - x0), t, s)

        return jax.lax.cond(s > 0.0, corrected, lambda: ahead)

    keys = jax.random.split(rest, config.steps)
    last, states = jax.lax.scan(step, z, (times[:-1], times[1:], keys))
    return last, None if states is None else jnp.concatenate([z[None], jnp.asarray(states)])


def build(
    denoise: Callable[..., Float[Array, "..."]],
    path: Path,
    kind: str,
    shape: tuple[int, ...],
    config: Sampler,
    trajectory: bool = False,
) -> Callable[..., Dynamic]:
    """One jitted call for a batch.

    Args:
      denoise: (params, z, t, cond, *scales) -> prediction of one example (see `guidance`).
      path: the noise schedule.
      kind: what is predicted, one of `predict.KINDS`.
      shape: of one z.
      config: the sampler.
      trajectory: whether to return all states too.

    Returns:
      run(params, keys [n], cond [n, C, E], *scales) -> z [n, *shape], and with `trajectory` also
      the
      states [n, steps + 1, *shape].

    Raises:
      ValueError: an unknown kind, or a start that has no data estimate.
    """
    check_kind(kind)
    with jax.ensure_compile_time_eval():
        alpha = float(path.alpha(jnp.asarray(config.start, jnp.float32)))
    if kind == "eps" and alpha < 1e-6:
        raise ValueError(
            f"sampler: an eps prediction says nothing of the data at t = {config.start} of path "
            f"{path.name!r}: got alpha = {alpha}, expected > 0; start earlier or predict v"
        )

    @jax.jit
    def run(params, keys, cond, *scales):
        def one(key, cond):
            def here(z, t):
                return denoise(params, z, t, cond, *scales)

            last, states = sample(here, key, shape, path, kind, config, trajectory)
            return (last, states) if trajectory else last

        return jax.vmap(one)(keys, cond)

    return run


SYSTEM = System(
    name="DDPM, DDIM, Euler and Heun samplers",
    paper="Ho 2020, 2006.11239; Song 2021, 2010.02502; Lipman 2023, 2210.02747",
    symbol="sample",
    evidence="discrete posterior; exact Gaussian denoiser; orders of convergence",
    kind="component",
)

r"""Multistep consistency sampling: jump to the data, put noise of the next level on it, jump again.

.. math::
    x_1 = f(\epsilon_0, t_1), \qquad
    x_{k+1} = f(\alpha_{t_{k+1}} x_k + \sigma_{t_{k+1}} \epsilon_k, t_{k+1}), \qquad
    t_k = 1 - \lfloor (k - 1) N / K \rfloor / N

K evaluations make a sample; one is a jump from noise to the data.

Symbols: f -> `jlora.generation.diffusion.consistency.jump`, N -> ``plan.steps``, K -> ``steps``.

Reference: Song et al. 2023 (arXiv:2303.01469), Algorithm 1; the levels as in Luo et al. 2023
    (arXiv:2310.04378): evenly spaced among those of the distillation.
Deviates: the first noise has the deviation of the path at t = 1 without data, as that of
    `jlora.generation.diffusion.samplers.sample`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.generation.diffusion.consistency import Distillation, jump
from jlora.types import Dynamic


def times(plan: Distillation, steps: int) -> Float[np.ndarray, "K"]:
    """The noise levels of a sample, all of which a student was taught.

    Args:
      plan: the grid.
      steps: K, evaluations.

    Returns:
      From 1 downwards, float32.

    Raises:
      ValueError: no steps, or more than the grid has.
    """
    if not 1 <= steps <= plan.steps:
        raise ValueError(f"steps: got {steps}, expected 1 to {plan.steps} of the distillation")
    passed = np.arange(steps) * plan.steps // steps
    return (1.0 - passed / plan.steps).astype(np.float32)


def sample(
    denoise: Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]],
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    plan: Distillation,
    steps: int,
) -> Float[Array, "..."]:
    """One sample of a student.

    Args:
      denoise: (z, t) -> prediction.
      key: of the noise.
      shape: of a sample.
      plan: what the student was distilled for.
      steps: K, evaluations; Raises are those of `times`.

    Returns:
      The data.
    """
    levels = jnp.asarray(times(plan, steps))

    def step(x, now):
        t, key = now
        z = plan.path.mix(x, jax.random.normal(key, shape), t)
        return jump(plan, denoise(z, t), z, t), None

    first, rest = jax.random.split(key)
    alpha, sigma = plan.path(levels[0])  # as `samplers.sample` starts: no data are known yet
    z = jnp.sqrt(alpha**2 + sigma**2) * jax.random.normal(first, shape)
    x = jump(plan, denoise(z, levels[0]), z, levels[0])
    return jax.lax.scan(step, x, (levels[1:], jax.random.split(rest, steps - 1)))[0]


def build(
    denoise: Callable[..., Float[Array, "..."]],
    shape: tuple[int, ...],
    plan: Distillation,
    steps: int,
) -> Callable[..., Dynamic]:
    """One jitted call for a batch.

    Args:
      denoise: (params, z, t, cond, *scales) -> prediction of one example (see `guidance`).
      shape: of a sample.
      plan: what the student was distilled for.
      steps: K, evaluations.

    Returns:
      run(params, keys [n], cond, *scales) -> [n, *shape].

    Raises:
      ValueError: as `times`.
    """
    times(plan, steps)

    @jax.jit
    def run(params, keys, cond, *scales):
        def one(key, cond):
            here = lambda z, t: denoise(params, z, t, cond, *scales)  # noqa: E731
            return sample(here, key, shape, plan, steps)

        return jax.vmap(one)(keys, cond)

    return run

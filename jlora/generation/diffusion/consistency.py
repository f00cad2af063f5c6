r"""Consistency distillation: a student that jumps from any noise level to the data in one step.

With x, e the data and noise that a prediction at (z, t) implies, a student is

.. math::
    f_\theta(z, t) = c_s(t)\, z + c_o(t)\, x_\theta(z, t), \qquad
    c_s = \frac{\varsigma^2}{(s \cdot 1000 t)^2 + \varsigma^2}, \quad
    c_o = \frac{s \cdot 1000 t}{\sqrt{(s \cdot 1000 t)^2 + \varsigma^2}}

so that f(z, 0) = z. It is taught to say the same at neighbouring points of the teacher's path from
noise to data, where the teacher is guided and makes a step of DDIM:

.. math::
    t &= n / N, \; n \sim U\{1, \dots, N\}, \qquad s = t - 1 / N, \qquad
    z_t = \alpha_t x + \sigma_t \epsilon, \qquad w \sim U[w_0, w_1] \\
    \hat y &= y_\varnothing + w (y_c - y_\varnothing), \qquad
    \hat z_s = \alpha_s\, x_{\hat y} + \sigma_s\, e_{\hat y} \\
    L &= d\bigl(f_\theta(z_t, t, c),\; f_{\theta^-}(\hat z_s, s, c)\bigr), \qquad
    d(p, q) = \overline{(p - q)^2} \;\text{ or }\; \overline{\sqrt{(p - q)^2 + h^2} - h}

`jlora.generation.diffusion.multistep` draws samples.

Symbols: :math:`\theta` -> ``params``, :math:`\theta^-` -> ``target``, N -> ``steps``,
:math:`\varsigma` -> ``sigma``, s (in c) -> ``scale``, h -> ``huber``, w -> guidance scale.

Reference: Luo et al. 2023 (arXiv:2310.04378), Algorithm 1; Luo et al. 2023 (arXiv:2311.05556) and
    its training script: the student is a LoRA of the teacher and is not given w, the target is the
    student itself without gradient, 50 solver steps, the l2 distance.
Deviates: noise levels are t in [0, 1] of any path, and the script's integer step is 1000 t. For a
    flow the data estimate is z - t u, so f(z, 0) = z even without c_s, which is below 1e-5 from the
    first grid point on. DDIM is exact Euler of the flow with the guided velocity. w = 1 is the
    conditional prediction, so it is 1 + w of the paper. The grid has N points and neighbours are
    one apart: N = 50 is the paper's 1000 levels with k = 20.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.generation.diffusion.paths import Path
from jlora.generation.diffusion.predict import check_kind, estimates
from jlora.generation.diffusion.samplers import ddim_step
from jlora.system import System
from jlora.types import Tree

DISTANCES = ("l2", "huber")

# (params, z, t, cond) -> prediction of one example, as `guidance.plain`
Student = Callable[..., Float[Array, "..."]]
# (z, t, cond, scale) -> guided prediction, as `guidance.guided` with its parameters bound
Teacher = Callable[..., Float[Array, "..."]]


@dataclass(frozen=True)
class Distillation:
    """What a student is distilled for; hashable, a static argument of jit.

    Raises:
      ValueError: when built from unknown names or impossible numbers.
    """

    path: Path  # noise schedule of teacher and student
    kind: str = "velocity"  # what both predict, one of predict.KINDS
    steps: int = 50  # N, of the solver from noise to data
    distance: str = "l2"  # one of DISTANCES; the script's default
    huber: float = 1e-3  # h
    sigma: float = 0.5  # deviation of the data in c
    scale: float = 10.0  # of the noise level in c

    def __post_init__(self):
        check_kind(self.kind)
        if self.distance not in DISTANCES:
            raise ValueError(
                f"Distillation.distance: got {self.distance!r}, expected one of {DISTANCES}"
            )
        if self.steps < 1 or min(self.huber, self.sigma, self.scale) <= 0.0:
            raise ValueError(
                f"Distillation: got steps={self.steps}, huber={self.huber}, sigma={self.sigma}, "
                f"scale={self.scale}; expected positive numbers"
            )


class Outcome(NamedTuple):
    """What one evaluation of the loss was made of."""

    losses: Float[Array, "B"]  # d of each example
    z: Float[Array, "B ..."]  # noisy samples
    t: Float[Array, "B"]  # their times
    ahead: Float[Array, "B ..."]  # where the teacher's step ended
    scales: Float[Array, "B"]  # guidance of that step


def boundary(
    t: Float[Array, "*times"], *, sigma: float = 0.5, scale: float = 10.0
) -> tuple[Float[Array, "*times"], Float[Array, "*times"]]:
    """The boundary condition of a consistency model: (1, 0) at t = 0, so that f(z, 0) = z exactly.

    Args:
      t: times, in [0, 1].
      sigma: deviation of the data; 0.5, as in the paper's code.
      scale: s, of a thousandth; 10, as in the paper's code (which divides by 0.1).

    Returns:
      (c_s, c_o).
    """
    moved = scale * 1000.0 * t
    square = jnp.square(moved) + sigma**2
    return sigma**2 / square, moved / jnp.sqrt(square)


def jump(
    plan: Distillation,
    prediction: Float[Array, "..."],
    z: Float[Array, "..."],
    t: Float[Array, ""],
) -> Float[Array, "..."]:
    """f: the data that a student sees behind a noisy sample.

    Args:
      plan: path, kind and boundary.
      prediction: of the student at (z, t).
      z: the noisy sample.
      t: its time; 0 gives z, unless the kind has no data estimate there.

    Returns:
      The shape of z.
    """
    skip, out = boundary(t, sigma=plan.sigma, scale=plan.scale)
    return skip * z + out * estimates(plan.path, plan.kind, prediction, z, t)[0]


def solver_step(
    plan: Distillation,
    prediction: Float[Array, "..."],
    z: Float[Array, "..."],
    t: Float[Array, ""],
    s: Float[Array, ""],
) -> Float[Array, "..."]:
    """One DDIM step of the teacher.

    Args:
      plan: path and kind.
      prediction: of the teacher at (z, t), guided.
      z: the noisy sample.
      t: its time.
      s: next time, s < t.

    Returns:
      The sample at s.
    """
    x0, eps = estimates(plan.path, plan.kind, prediction, z, t)
    return ddim_step(plan.path, 0.0, x0, eps, t, s, jnp.zeros_like(z))


def distance(
    plan: Distillation, p: Float[Array, "..."], q: Float[Array, "..."]
) -> Float[Array, ""]:
    """d, the mean over all numbers of an example.

    Args:
      plan: which distance.
      p: what the student says.
      q: what it should say.

    Returns:
      A scalar.
    """
    square = jnp.square(p - q)
    if plan.distance == "l2":
        return jnp.mean(square)
    return jnp.mean(jnp.sqrt(square + plan.huber**2) - plan.huber)


def consistency_loss(
    student: Student,
    teacher: Teacher,
    params: Tree,
    target: Tree,
    key: PRNGKeyArray,
    x: Float[Array, "B ..."],
    cond: Tree,
    plan: Distillation,
    scales: tuple[float, float] = (8.5, 8.5),
) -> tuple[Float[Array, ""], Outcome]:
    """Algorithm 1 on one batch.

    Args:
      student: (params, z, t, cond) -> prediction of one example.
      teacher: (z, t, cond, scale) -> guided prediction of one example.
      params: of the student, or of its adapter; what is differentiated.
      target: of the student's copy that says what is right: `params` itself, or their average;
        never differentiated.
      key: of times, noise and guidance scales.
      x: data.
      cond: conditions, leaves [B, ...].
      plan: what the student is distilled for.
      scales: least and largest guidance scale of the teacher; 8.5 is the report's fixed w = 7.5.

    Returns:
      The mean loss, and what it was made of.

    Raises:
      ValueError: a least scale above the largest.
    """
    if scales[0] > scales[1]:
        raise ValueError(f"scales: got {scales}, expected the least one first")
    at, noisy, guide = jax.random.split(key, 3)
    number = jax.random.randint(at, (len(x),), 1, plan.steps + 1).astype(jnp.float32)
    t, s = number / plan.steps, (number - 1.0) / plan.steps
    noise = jax.random.normal(noisy, x.shape, x.dtype)
    drawn = jax.random.uniform(guide, (len(x),), minval=scales[0], maxval=scales[1])

    def one(x, noise, t, s, scale, cond):
        z = plan.path.mix(x, noise, t)
        ahead = solver_step(plan, teacher(z, t, cond, scale), z, t, s)
        said = jump(plan, student(params, z, t, cond), z, t)
        right = jump(plan, student(target, ahead, s, cond), ahead, s)
        ahead, right = jax.lax.stop_gradient((ahead, right))
        return distance(plan, said, right), z, ahead

    losses, z, ahead = jax.vmap(one)(x, noise, t, s, drawn, cond)
    return jnp.mean(losses), Outcome(losses, z, t, ahead, drawn)


SYSTEM = System(
    name="LCM-LoRA",
    paper="Luo 2023, 2311.05556; 2310.04378",
    symbol="consistency_loss",
    evidence="loss by numpy; the exact consistency function of a Gaussian, which one step samples "
    "and which distillation reaches; boundary; mutation checks",
    rows=(51,),
    claim="lcm_lora",
)

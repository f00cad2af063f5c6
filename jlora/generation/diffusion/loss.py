r"""The training loss of a denoiser on one batch.

.. math::
    L = \frac1B \sum_i w(t_i)\, \frac1{SL}
        \| f(z_i, t_i, c_i) - y_i \|^2, \qquad z_i = \alpha(t_i) x_i + \sigma(t_i) \epsilon_i

y is the target of the prediction kind. With min-SNR, :math:`w = \min(\mathrm{snr}, \gamma) / r`,
r = squared error in that kind over squared error in x0, so that every kind weighs the x0 error by
:math:`\min(\alpha^2/\sigma^2, \gamma)`; otherwise w = 1.

Times: ``uniform`` on [t_min, 1); ``stratified``: one uniform draw in each of B equal parts of it,
in random order; ``logit_normal``: sigmoid of N(logit_mean, logit_std^2); ``discrete``: i / steps, i
uniform in 1..steps (the paper's DDPM). Each condition is replaced by the null one with probability
``drop``.

Symbols: f -> ``model``, c -> ``cond``, :math:`\gamma` -> ``min_snr``, p -> ``drop``.
Shapes: x [B, S, L], cond [B, C, E] float32; loss scalar; see Outcome for the rest.
Raises: ValueError when the Objective is built from unknown names or impossible numbers.
Papers: Ho et al. 2020; Hang et al. 2023 (min-SNR); Esser et al. 2024 (logit-normal times); Ho and
Salimans 2022 (condition dropout).
Source: papers.
Deviates: ``time_bug`` reproduces an error of the official Cond P-Diff code, where the whole batch
is given the first example's timestep; off unless asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jlora.generation.diffusion import predict
from jlora.generation.diffusion.paths import Path
from jlora.types import Dynamic, Tree

TIMES = ("uniform", "stratified", "logit_normal", "discrete")


@dataclass(frozen=True)
class Objective:
    """What the denoiser is trained for."""

    path: Path  # noise schedule
    kind: str = "v"  # one of predict.KINDS
    times: str = "uniform"  # one of TIMES
    t_min: float = 1e-3  # earliest uniform time
    steps: int = 1000  # of discrete times
    logit_mean: float = 0.0  # of logit-normal times
    logit_std: float = 1.0
    min_snr: float | None = None  # gamma; None weighs every time alike
    drop: float = 0.1  # probability of the null condition
    time_bug: bool = False  # give the model t of the first example only

    def __post_init__(self):
        predict.check_kind(self.kind)
        if self.times not in TIMES:
            raise ValueError(f"Objective.times: got {self.times!r}, expected one of {TIMES}")
        if not 0.0 < self.t_min < 1.0 or not 0.0 <= self.drop <= 1.0:
            raise ValueError(
                f"Objective: got t_min={self.t_min}, drop={self.drop}; "
                "expected 0 < t_min < 1 and 0 <= drop <= 1"
            )
        if self.steps < 1 or self.logit_std <= 0.0 or (self.min_snr or 1.0) <= 0.0:
            raise ValueError(
                f"Objective: got steps={self.steps}, logit_std={self.logit_std}, "
                f"min_snr={self.min_snr}; expected positive numbers"
            )


class Outcome(NamedTuple):
    """What one evaluation of the loss leaves behind."""

    losses: Float[Array, "B"]  # weighted loss of each example
    x0: Float[Array, "B S L"]  # data estimate, for a task loss through the decoder
    hidden: Dynamic  # activations [B, ...] of the model's chosen block, for the dispersive loss
    t: Float[Array, "B"]  # times drawn
    null: Bool[Array, "B"]  # whose condition was dropped


def draw_times(key: PRNGKeyArray, count: int, objective: Objective) -> Float[Array, "B"]:
    """Times from the law of the objective.

    Args:
      key: of the draw.
      count: B.
      objective: its `times` and their parameters.

    Returns:
      Times in (0, 1], float32.
    """
    if objective.times == "discrete":
        index = jax.random.randint(key, (count,), 1, objective.steps + 1)
        return index.astype(jnp.float32) / objective.steps
    if objective.times == "logit_normal":
        normal = jax.random.normal(key, (count,))
        return jax.nn.sigmoid(objective.logit_mean + objective.logit_std * normal)
    if objective.times == "stratified":
        inside, order = jax.random.split(key)
        part = jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(inside, (count,))
        unit = jax.random.permutation(order, part / count)
    else:
        unit = jax.random.uniform(key, (count,))
    return objective.t_min + (1.0 - objective.t_min) * unit


def weight(objective: Objective, t: Float[Array, ""]) -> Float[Array, ""]:
    """min-SNR weight of one time.

    Args:
      objective: its path, kind and `min_snr`.
      t: the time.

    Returns:
      w(t); 1 without min-SNR.
    """
    if objective.min_snr is None:
        return jnp.ones_like(t)
    alpha, sigma = objective.path(t)
    bounded = jnp.minimum((alpha / sigma) ** 2, objective.min_snr)
    return bounded / predict.error_ratio(objective.path, objective.kind, t)


def diffusion_loss(
    model: Callable[..., tuple[Float[Array, "S L"], Dynamic]],
    params: Tree,
    key: PRNGKeyArray,
    x: Float[Array, "B S L"],
    cond: Float[Array, "B C E"],
    objective: Objective,
) -> tuple[Float[Array, ""], Outcome]:
    """Loss of one batch.

    Args:
      model: (params, z, t, cond, null) -> (prediction, hidden), of one example.
      params: of the model.
      key: of times, noise and dropped conditions.
      x: latents.
      cond: condition tokens.
      objective: what the denoiser is trained for.

    Returns:
      The mean loss, and what it was made of.
    """
    path, kind, count = objective.path, objective.kind, x.shape[0]
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    t = draw_times(key_t, count, objective)
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    null = jax.random.bernoulli(key_drop, objective.drop, (count,))
    model_t = jnp.full_like(t, t[0]) if objective.time_bug else t

    def one(x, noise, t, model_t, cond, null):
        z = path.mix(x, noise, t)
        value, hidden = model(params, z, model_t, cond, null)
        error = value - predict.target(path, kind, x, noise, t)
        x0, _ = predict.estimates(path, kind, value, z, t)
        return weight(objective, t) * jnp.mean(error**2), x0, hidden

    losses, x0, hidden = jax.vmap(one)(x, noise, t, model_t, cond, null)
    return jnp.mean(losses), Outcome(losses, x0, hidden, t, null)

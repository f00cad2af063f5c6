"""PSEC: skills stay apart as adapters, and the context decides how much of each is in the weight.

==========  ==================================================================
u_n, v_n    factors of skill n, frozen, [d_in, R], [R, d_out]
s           context (an observation), [..., d_obs]
alpha(s)    how much of each skill, [..., N], by a small network
rho         the strength that the last, current skill is pulled to
==========  ==================================================================

.. math:: y = x W + \\sum_n \\alpha_n(s) \\, x u_n v_n, \\qquad
          \\alpha(s) = W_2 \\, \\mathrm{relu}(W_1 s + b_1) + b_2

Every row of a batch has its own merged weight and none is formed: the skills share two thin
products. A skill that is added leaves the others as they are; constant alpha is the exact weighted
sum (`concat`). While alpha is trained, a penalty keeps it near "the current skill alone":

.. math:: (\\overline{\\alpha} - \\rho/2)^2 + (\\overline{\\alpha_N} - \\rho)^2

with means over the batch, the first over all columns too.

Paper: Liu et al. 2025, arXiv:2502.05932.
Source: official code (ltlhuuu/PSEC), for the maths; it has two skills, N skills as in the abstract.
Deviates: rho / 2 becomes rho / N; scales are folded into the factors; the width of the network is
chosen here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.contracts.composition import Composition, Denoiser
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.core.site import Arrays
from jlora.merging.engine.inputs import gather
from jlora.types import Dynamic, Tree


@dataclasses.dataclass(frozen=True)
class PSEC(Method):
    """Frozen skills `u` [N, d_in, R], `v` [N, R, d_out]; alpha comes in `ctx[name]`."""

    skills: int
    name: str = "alpha"

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; ctx[name] is [N], or [*lead, N] with leading axes of x.

        Raises:
          ValueError: no ctx[name], or one of another shape.
        """
        if self.name not in ctx:
            raise ValueError(f"PSEC: ctx has no {self.name!r}; got {sorted(ctx)}")
        alpha, y = jnp.asarray(ctx[self.name]), x @ w
        n, d_in, r = p["u"].shape
        lead = alpha.shape[:-1]
        if alpha.shape[-1:] != (n,) or lead != y.shape[: len(lead)] or len(lead) >= y.ndim:
            raise ValueError(
                f"PSEC: ctx[{self.name!r}] got shape {alpha.shape}, expected ({n},) after leading "
                f"axes of {y.shape[:-1]}"
            )
        u = jnp.moveaxis(p["u"], 0, 1).reshape(d_in, n * r)
        h = x @ u.astype(y.dtype)
        gate = jnp.repeat(alpha.astype(h.dtype), r, axis=-1)
        gate = gate.reshape(*lead, *[1] * (h.ndim - 1 - len(lead)), n * r)
        return y + (h * gate) @ p["v"].reshape(n * r, -1).astype(h.dtype)


def compose(skills: Sequence[Adapter] | Adapter, *, missing: str = "error") -> Adapter:
    """An adapter that holds all skills; none of them is trained.

    Args:
      skills: adapters of any methods with factors and of any ranks; one Adapter is a bank of
        `jl.stack`.
      missing: "error", or "zero": one without a site counts there as a zero delta.

    Returns:
      An adapter of `PSEC` at all sites, to be run with alpha in the context.

    Raises:
      ValueError: skills that `gather` refuses.
    """
    bank, weights, sites = gather(skills, missing=missing)
    frozen = {}
    for site in sites:
        u, v = bank[site.path]  # type: ignore[misc]
        axis = len(site.stack)
        frozen[site.path] = {"u": jnp.moveaxis(u, 0, axis), "v": jnp.moveaxis(v, 0, axis)}
    method = PSEC(weights.shape[0])
    return Adapter({}, frozen, tuple((site, method) for site in sites))


def init_context(key: PRNGKeyArray, d_obs: int, skills: int, hidden: int = 64) -> Arrays:
    """Parameters of alpha(s); at the start it is 1 for the last skill and 0 for the others.

    Args:
      key: of the first layer.
      d_obs: size of an observation.
      skills: N.
      hidden: width of the network.

    Returns:
      w1 [d_obs, hidden], b1 [hidden], w2 [hidden, N] and b2 [N].
    """
    w = jax.random.normal(key, (d_obs, hidden)) / math.sqrt(d_obs)
    start = (jnp.arange(skills) == skills - 1).astype(w.dtype)
    return {"w1": w, "b1": jnp.zeros(hidden), "w2": jnp.zeros((hidden, skills)), "b2": start}


def context(params: Arrays, observation: Float[Array, "... d_obs"]) -> Float[Array, "... N"]:
    """How much of each skill a context asks for.

    Args:
      params: of `init_context`.
      observation: the context s.

    Returns:
      alpha, [..., N].
    """
    hidden = jnp.matmul(observation, params["w1"])
    hidden = jax.nn.relu(hidden + _row(params["b1"], hidden.ndim))
    out = jnp.matmul(hidden, params["w2"])
    return out + _row(params["b2"], out.ndim)


def penalty(alpha: Float[Array, "... N"], strength: float = 1.0) -> Float[Array, ""]:
    """The pull of alpha towards the last skill alone.

    Args:
      alpha: of a batch of contexts.
      strength: rho; 1 is the last skill as it was trained.

    Returns:
      A scalar, to be added to the loss.
    """
    n = alpha.shape[-1]
    return (jnp.mean(alpha) - strength / n) ** 2 + (jnp.mean(alpha[..., -1]) - strength) ** 2


def denoise(
    model: Denoiser,
    params: Tree,
    skills: Adapter,
    alpha: Float[Array, "N"],
    z: Float[Array, "..."],
    t: Float[Array, ""],
) -> Float[Array, "..."]:
    """One prediction of a denoiser in whose weights the skills are composed.

    Args:
      model: (params, z, t) -> prediction.
      params: weights of the base.
      skills: of `compose`.
      alpha: how much of each skill, [N].
      z: the noisy sample.
      t: its time.

    Returns:
      The prediction, as z.
    """
    return lift(model)(params, skills, z, t, ctx={"alpha": alpha})


def _row(x: Array, ndim: int) -> Array:
    return x.reshape(*[1] * (ndim - 1), -1)


SYSTEM = Composition(
    name="PSEC",
    paper="Liu 2025, 2502.05932",
    symbol="compose",
    evidence="merged weights row by row; parameters compose what outputs cannot; mutation check",
    rows=(49,),
    claim="psec",
    prepare=compose,
    denoise=denoise,
)

"""LCM-LoRA's arithmetic: what makes a model fast is a vector, added to what gives it a style.

==========  ==================================================================
tau         acceleration vector, theta of the distilled model - theta of the base, as an adapter
tau'        style vector, an adapter trained without distillation
l1, l2      their strengths
==========  ==================================================================

.. math:: \\theta' = \\theta + \\lambda_1 \\tau' + \\lambda_2 \\tau, \\qquad
          \\lambda_1 = 0.8, \\; \\lambda_2 = 1

No training: the sum is exact, at any ranks and of different sites. tau itself comes from
consistency distillation, with the student's own boundary condition f(z, 0) = z,

.. math:: f(z, t) = c_s(t) z + c_o(t) \\hat x_0(z, t), \\quad
          c_s = \\frac{\\sigma^2}{(s t)^2 + \\sigma^2}, \\;
          c_o = \\frac{s t}{\\sqrt{(s t)^2 + \\sigma^2}} .

Paper: Luo et al. 2023, arXiv:2311.05556.
Source: paper for the sum; its default strengths, sigma = 0.5 and s = 10 from memory, unverified.
Deviates: nothing.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.core.adapter import Adapter
from jlora.merging.engine.inputs import gather, per_site, to_adapter
from jlora.merging.exact.concat import concat
from jlora.system import System


def lcm_arithmetic(
    styles: Adapter | Sequence[Adapter],
    acceleration: Adapter,
    *,
    style: float | Sequence[float] = 0.8,
    strength: float = 1.0,
) -> Adapter:
    """The sum of one style, or of several, and an acceleration vector.

    Adapters may have different sites; one without a site adds nothing there.

    Args:
      styles: one adapter, or a list of them.
      acceleration: the adapter that makes the model fast.
      style: l1, one strength or one for each style; 0.8, as in the paper.
      strength: l2, of the acceleration; 1, as in the paper.

    Returns:
      A LoRA adapter of the summed ranks.

    Raises:
      ValueError: another number of strengths than styles, and as `gather` does.
    """
    many = [styles] if isinstance(styles, Adapter) else list(styles)
    strengths = [style] * len(many) if isinstance(style, int | float) else list(style)
    if len(strengths) != len(many):
        raise ValueError(
            f"style: got {len(strengths)}, expected one for each of {len(many)} styles"
        )
    weights = jnp.asarray([*strengths, strength], jnp.float32)
    bank, weights, sites = gather([*many, acceleration], weights, missing="zero")
    return to_adapter(per_site(concat)(bank, weights), sites)


def boundary(
    t: Float[Array, "*times"], *, sigma: float = 0.5, scale: float = 10.0
) -> tuple[Array, Array]:
    """The boundary condition of a consistency model: (1, 0) at t = 0, so that f(z, 0) = z exactly.

    Args:
      t: times, in [0, 1].
      sigma: standard deviation of the data; 0.5, as in the paper's code.
      scale: s, of the time; 10, as in the paper's code.

    Returns:
      (c_s, c_o), each [*times].
    """
    moved = jnp.square(scale * t)
    return sigma**2 / (moved + sigma**2), scale * t / jnp.sqrt(moved + sigma**2)


SYSTEM = System(
    name="LCM-LoRA arithmetic",
    paper="Luo 2023, 2311.05556",
    symbol="lcm_arithmetic",
    evidence="dense sum; fewer steps of a styled linear flow; mutation check",
    kind="composition",
    rows=(51,),
    missing="a distilled diffusion base",
)

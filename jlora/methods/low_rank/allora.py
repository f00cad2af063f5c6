r"""ALLoRA: no dropout, no alpha; each output learns faster the smaller its part of the delta is.

==================  ====================================================================
A, B                factors of the delta A B, [d_in, r] and [r, d_out]; B starts at zero
G                   the gradient with respect to the delta, [d_in, d_out]
c                   [d_out], the factors of the gradient; constants for differentiation
:math:`\eta`        `eta`, the factor while the delta is zero
==================  ====================================================================

.. math::
    W' = W + A B, \qquad c_j = \bigl( \lVert (A B)_{:,j} \rVert_2 + \eta^{-2} \bigr)^{-1/2}, \qquad
    g_A = G\, \mathrm{diag}(c)\, B^T, \qquad g_B = A^T G\, \mathrm{diag}(c)

The value is LoRA's at scale 1, and so is the gradient that reaches the activations: only A and B
learn from scaled gradients. Both come out of one product of rank 2 r, with :math:`\bar A, \bar B`
held constant for differentiation:

.. math:: A B = \begin{bmatrix} A & \bar A \end{bmatrix}
                \begin{bmatrix} B\, \mathrm{diag}(c) \\ \bar B\, \mathrm{diag}(1 - c) \end{bmatrix}

so every path of the library (views, convolutions, tables, merging) has the same gradient without
a rule of its own. The norms come from :math:`A^T A`, [r, r].

Reference: Huang and Balestriero 2024, arXiv:2410.09692.
Deviates: none known; the ablations of the paper (per-sample factors, factors in the value) are not
  here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class ALLoRA(Method):
    """Hyper-parameters of a low-rank adapter with adaptive gradients.

    Trainable `a` [d_in, r], `b` [r, d_out]; frozen `eta` [].

    Args:
      rank: r, at least 1.
      eta: the factor of gradients while the delta is zero, positive; the paper tries squares of 1,
        2 and 4.

    Raises:
      ValueError: a value out of range.
    """

    rank: int = 8
    eta: float = dataclasses.field(default=math.sqrt(2.0), compare=False)

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    def __post_init__(self):
        check_whole("ALLoRA.rank", self.rank)
        if not (self.eta > 0 and math.isfinite(self.eta)):
            raise ValueError(f"ALLoRA.eta: got {self.eta}, expected a positive number")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """As LoRA: A uniform in +-1/sqrt(d_in), B zero."""
        bound, dtype = 1.0 / math.sqrt(site.d_in), site.param_dtype
        a = jax.random.uniform(key, (site.d_in, self.rank), dtype, -bound, bound)
        b = jnp.zeros((self.rank, site.d_out), dtype)
        return {"a": a, "b": b}, {"eta": jnp.asarray(self.eta, jnp.float32)}

    def factors(self, p: Arrays) -> tuple[Array, Array]:
        """The delta as a product of rank 2 r whose gradients are the scaled ones."""
        a, b = jax.lax.stop_gradient((p["a"], p["b"]))
        c = gradient_factors(a, b, p["eta"])[None, :]
        return jnp.concatenate([p["a"], a], 1), jnp.concatenate([p["b"] * c, b * (1 - c)], 0)


def gradient_factors(
    a: Float[Array, "d_in r"], b: Float[Array, "r d_out"], eta: Float[Array, ""]
) -> Float[Array, " d_out"]:
    """c: the factor of the gradients of each output.

    Args:
      a: A.
      b: B.
      eta: the factor where the delta is zero.

    Returns:
      (norm of each column of A B + eta^-2)^(-1/2), in the dtype of B.
    """
    squares = jnp.einsum("ro,rs,so->o", b, a.T @ a, b)
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    return jax.lax.rsqrt(norms + eta.astype(b.dtype) ** -2)


SYSTEM = System(
    name="ALLoRA",
    paper="Huang 2024, 2410.09692",
    symbol="ALLoRA",
    evidence="gradients by numpy; the value and the gradient of activations are LoRA's",
    rows=(26,),
    claim="allora",
    examples=(ALLoRA(rank=2),),
)

"""Fed-SB: fixed orthonormal bases on both sides, only an r x r core is trained and averaged.

======  ====================================================================
G       a first full fine-tuning step, -eta sign(sum of gradients), [d_in, d_out]
L, R    `left` [d_in, r], `right` [r, d_out]: its leading singular vectors, frozen
C_k     core of client k, [r, r], starts at the leading singular values
======  ====================================================================

.. math:: U S V^T = G, \\; L = U_{:r}, \\; R = V_{:r}^T, \\; C_0 = \\mathrm{diag}(S_{:r}), \\qquad
          L \\bigl(\\sum_k p_k C_k\\bigr) R = \\sum_k p_k L C_k R

The average is exact whatever the number of clients, r^2 numbers per site are sent, and a step on C
is the full step seen through the bases: L (L^T G R^T) R.

Shapes: cores [N, r, r]; weights [N]; result u [d_in, r], v [r, d_out].

Paper: Singhal et al. 2025, arXiv:2502.15436; the core: LoRA-SB, Ponkshe et al. 2024, 2411.19557.
Source: a copy of the official code (CERT-Lab/fed-sb), for the maths.
Deviates: exact SVD (theirs is randomised); the scale is 1 (their alpha = r).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.federated.fedavg import weighted


class Bases(NamedTuple):
    """What all clients share, and where they start."""

    left: Array  # [d_in, r], orthonormal columns
    core: Array  # [r, r], diagonal
    right: Array  # [r, d_out], orthonormal rows


def bases(gradient: Float[Array, "d_in d_out"], rank: int, *, eta: float = 1.0) -> Bases:
    """The bases of one site from a summed gradient.

    Args:
      gradient: of the full weight.
      rank: r, 1..min(d_in, d_out).
      eta: size of the step that the core starts with; 1.

    Returns:
      left [d_in, r], core [r, r], right [r, d_out].

    Raises:
      ValueError: a rank out of range.
    """
    if not 1 <= rank <= min(gradient.shape):
        raise ValueError(f"rank: got {rank}, expected in 1..{min(gradient.shape)}")
    u, s, v = numerics.svd(-eta * jnp.sign(gradient))
    return Bases(u[:, :rank], jnp.diag(s[:rank]), v[:rank])


def fed_sb(
    left: Float[Array, "d_in r"],
    cores: Float[Array, "n r r"],
    right: Float[Array, "r d_out"],
    weights: Float[Array, "n"],
) -> LowRank:
    """The exact average of one site: u = L mean(C), v = R.

    Args:
      left: shared basis of the inputs.
      cores: of the clients.
      right: shared basis of the outputs.
      weights: shares, summing to 1.

    Returns:
      u [d_in, r], v [r, d_out].
    """
    return LowRank(
        jnp.matmul(left, weighted(weights, cores), precision=lax.Precision.HIGHEST), right
    )


def _from_factors(bank: LowRank, weights: Array) -> Round:
    """Clients as factors u_k = C_k (their core behind the identity) and one frozen R."""
    left = jnp.eye(bank.u.shape[-2], dtype=bank.u.dtype)
    return Round(fed_sb(left, bank.u, bank.v[0], weights))


SYSTEM = Aggregation(
    name="Fed-SB",
    paper="Singhal 2025, 2502.15436",
    symbol="fed_sb",
    claim="fed_sb",
    missing="noise for privacy",
    evidence="exact; bases by dense SVD; gradient of the core through the bases",
    rows=(70,),
    aggregate=_from_factors,
    exact=True,
    shared="uv",
)

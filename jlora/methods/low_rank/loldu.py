r"""LoLDU: the LDU factors of the weight are frozen, and only a part of the diagonal is trained.

=========  =======================================================================
W          `w`, frozen, [d_in, d_out]; k = min(d_in, d_out)
P, L, U    of the transposed weight [d_out, d_in]: permutation, unit lower and unit
           upper triangular; the first r columns of P L are `v`\ :sup:`T`, the first
           r rows of U are `u`\ :sup:`T`, both frozen
D          `d` [r], frozen: the first r pivots
z          `z` [r], trained
s          `scale`: alpha / r
=========  =======================================================================

.. math::
    W^T = P L \, \mathrm{diag}(D) \, U, \qquad
    W' = W + s \, u \, \mathrm{diag}(z - D) \, v, \qquad
    u = U_{:r,:}^T, \; v = (P L)_{:,:r}^T

which is the paper's residual :math:`W - s\,u\,\mathrm{diag}(D)\,v` plus the trained part. r numbers
per site. Init: z = D, hence the identity. With r = k and s = 1, z = 0 leaves nothing of W.

A pivot that is tiny next to the largest would blow up its row of U; such rows keep their size
and their D is 1: the product is the same.

Shi et al., `LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
Fine-Tuning <https://arxiv.org/abs/2410.13618>`_, 2024.

Source: paper and official code.
Deviates: the base is not edited: what the paper subtracts from it is in the frozen leaves. z always
starts at D, as the other starts of the code do not start at the base.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site, at_least_float32
from jlora.system import System

TINY = 1e-6  # of the largest pivot: smaller ones stay in U


def ldu(
    w: Float[Array, "d_in d_out"],
) -> tuple[Float[Array, "d_in k"], Float[Array, " k"], Float[Array, "k d_out"]]:
    """The factors of a weight: u diag(d) v == w.

    Args:
      w: the weight, floating, at least float32.

    Returns:
      u, the transposed unit upper factor; d, the pivots; v, the transposed permuted lower factor.
    """
    packed, _, order = jax.lax.linalg.lu(w.T)
    k = min(w.shape)
    lower = jnp.tril(packed[:, :k], -1) + jnp.eye(w.shape[1], k, dtype=w.dtype)
    upper, pivot = jnp.triu(packed[:k]), jnp.diagonal(packed)[:k]
    d = jnp.where(jnp.abs(pivot) > TINY * jnp.max(jnp.abs(pivot)), pivot, 1)
    return (upper / d[:, None]).T, d, jnp.zeros_like(lower).at[order].set(lower).T


@dataclasses.dataclass(frozen=True)
class LoLDU(Method):
    """Adapter of `rank` trained pivots.

    Raises:
      ValueError: rank < 1; at init, a rank above min(d_in, d_out).
    """

    rank: int = 15
    alpha: float = dataclasses.field(default=15.0, compare=False)

    def __post_init__(self) -> None:
        check_whole("LoLDU.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """z [r] = d; frozen u [d_in, r], d [r], v [r, d_out], scale []."""
        limit, r, dtype = min(site.d_in, site.d_out), self.rank, site.param_dtype
        if r > limit:
            raise ValueError(f"{site.path}: LoLDU rank: got {r}, expected at most {limit}")
        u, d, v = ldu(context.weight().astype(at_least_float32(dtype)))
        frozen = {"u": u[:, :r], "d": d[:r], "v": v[:r]}
        frozen = {name: x.astype(dtype) for name, x in frozen.items()}
        scale = jnp.asarray(self.alpha / r, jnp.float32)
        return {"z": frozen["d"]}, {**frozen, "scale": scale}

    def factors(self, p: Arrays) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
        """u [d_in, r] times s (z - d), v [r, d_out]."""
        return p["u"] * (p["scale"] * (p["z"] - p["d"]))[None, :], p["v"]


SYSTEM = System(
    name="LoLDU",
    paper="Shi 2024, 2410.13618",
    symbol="LoLDU",
    evidence="factors against SciPy's LU; all pivots at zero leave nothing of the weight",
    rows=(9,),
    claim="loldu",
    examples=(LoLDU(rank=3, alpha=4.0),),
)

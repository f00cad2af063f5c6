"""KnOTS: adapters in one common basis of outputs, merged entry by entry there.

=======  ==================================================================
Δ_n      delta of adapter n, [d_in, d_out], factored
Y        common right singular basis [q, d_out], q = min(N R, d_out)
Z_n      its coefficients, [d_in, q]
=======  ==================================================================

.. math::
    [\\Delta_1; ...; \\Delta_N] = X S Y, \\quad Z_n = \\Delta_n Y^T, \\qquad
    \\Delta = \\mathrm{merge}(Z_1, ..., Z_N) \\; Y

With `rule="ties"` entries of the Z are trimmed, elected and averaged as in `core_space`, with
`rule="sum"` the result is the exact sum. Only thin matrices are formed.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result [d_in, q], [q, d_out].
Raises ValueError for an unknown rule, or a density outside (0, 1].

Paper: Stoica et al. 2024, arXiv:2410.19735.
Source: official code (gstoica27/KnOTS).
Deviates: entries are trimmed within a site and a layer, the official code trims over all of them.
Weights are ours. Gradients hold the basis fixed.
"""

from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.algebra import LowRank
from jlora.merging.engine.record import HELD, SMALL_ENTRIES, Merging
from jlora.merging.engine.spectral_functions import dot
from jlora.merging.signs import without_absent
from jlora.merging.spectral.core_space import entrywise, to_core


def knots(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    rule: str = "ties",
    density: float | tuple[float, ...] = 0.2,
    scale: Float[Array, ""] | float = 1.0,
) -> LowRank:
    """The merge of one site in the common basis of its outputs.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      rule: "ties" (trim, elect, mean), or "sum", which is exact.
      density: share of the entries of each Z_n that "ties" keeps, in (0, 1]; one number, or a tuple
        of N; 0.2, as in TIES.
      scale: lambda, a factor of the result; 1.

    Returns:
      u [d_in, q], v [q, d_out] with orthonormal rows.

    Raises:
      ValueError: an unknown rule, or a density out of range.
    """
    core = to_core(without_absent(bank, weights))
    n, p, q = core.cores.shape
    y = numerics.svd(core.cores.reshape(n * p, q))[2]
    y = lax.stop_gradient(dot("kq,qo->ko", y, core.right))
    z = dot("nir,nro,ko->nik", bank.u, bank.v, y)
    return LowRank(scale * entrywise(z, weights, rule, density), y)


SYSTEM = Merging(
    name="knots",
    paper="Stoica 2024, 2410.19735",
    symbol="knots",
    claim="knots",
    function=knots,
    options={"density": 0.2},
    breaks={
        "weight_one": SMALL_ENTRIES,
        "idempotent": SMALL_ENTRIES,
        "difference": HELD,
    },
    evidence="numpy value; law suite",
)

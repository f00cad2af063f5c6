"""TSV-Merge: the leading singular vectors of all adapters, made orthogonal to each other, summed.

=======  =======================================================================
C_n      core of adapter n (`core_space`) = X_n S_n Y_n^T, [p, q]
k        `rank`: directions kept of each adapter (all R of them if None)
polar    nearest matrix of orthonormal columns: M = P D Q^T -> P Q^T
w_n      weights
=======  =======================================================================

.. math::
    X = \\mathrm{polar}[X_{1,:k}, ..., X_{N,:k}], \\; Y = \\mathrm{polar}[Y_{1,:k}, ...], \\qquad
    C = X \\, \\mathrm{diag}(w_1 S_{1,:k}, ..., w_N S_{N,:k}) \\, Y^T

Two adapters that use the same input or output directions stop interfering there.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank min(p, q).
Raises ValueError for a rank out of range.

Paper: Gargiulo et al. 2025, arXiv:2412.00081 (TSV-M).
Source: official code (AntoAndGar/task_singular_vectors); in the core as in core-space-merging.
Deviates: the official code keeps min(d_in, d_out) / N directions, here at most R exist. Directions
of singular value zero are left out. Weights are ours (the official code sums, w_n = 1).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.engine.spectral_functions import dot, polar, top_pair
from jlora.merging.signs import present
from jlora.merging.spectral.core_space import from_core, to_core


def tsv(bank: LowRank, weights: Float[Array, "n"], *, rank: int | None = None) -> LowRank:
    """The merge of one site by orthogonalised task singular vectors.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; 0 leaves an adapter's directions out.
      rank: directions kept of each adapter, 1 to min(d_in, d_out) (R exist); None: all.

    Returns:
      u [d_in, k], v [k, d_out], k = min(p, q).

    Raises:
      ValueError: a rank out of range.
    """
    full = min(bank.u.shape[1], bank.v.shape[2])
    if rank is not None and not 1 <= rank <= full:
        raise ValueError(f"rank: got {rank}, expected 1 to {full}")
    core = to_core(bank)
    n, p, q = core.cores.shape
    k = min(bank.u.shape[-1] if rank is None else rank, p, q)
    x, b, y, _ = jax.vmap(lambda c: top_pair(c, k))(core.cores)  # [N, p, k], [N, k, k], [N, k, q]
    there = present(weights)[:, None, None]
    x, y = x * there, y * there
    x = polar(jnp.moveaxis(x, 0, 1).reshape(p, n * k)).reshape(p, n, k)
    y = polar(y.reshape(n * k, q)).reshape(n, k, q)
    return from_core(core, dot("n,pnk,nkl,nlq->pq", weights, x, b, y))


SYSTEM = Merging(
    name="tsv",
    paper="Gargiulo 2025, 2412.00081",
    symbol="tsv",
    claim="tsv",
    function=tsv,
    breaks={
        "idempotent": "equal directions are made orthogonal: N copies give 1/N of one",
    },
    evidence="numpy value; law suite",
)

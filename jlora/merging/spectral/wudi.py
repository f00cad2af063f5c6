"""WUDI: the merge that interferes least with each adapter, by its closed form.

=======  =============================================================================
C_n      core of adapter n (`core_space`) = X_n S_n Y_n^T, [p, q]
w_n      weight of its loss; a negative one subtracts C_n (only the ratios of |w_n| matter)
=======  =============================================================================

.. math::
    \\min_C \\sum_n \\frac{w_n}{\\|C_n\\|^2} \\| C_n^T (C - C_n) \\|^2 \\;\\Rightarrow\\;
    C = P^+ Q, \\; P = \\Big[ \\frac{\\sqrt{w_n}}{\\|C_n\\|} S_n X_n^T \\Big]_n, \\;
    Q = \\Big[ \\frac{\\sqrt{w_n}}{\\|C_n\\|} S_n^2 Y_n^T \\Big]_n

(stacked rows; the rotation Y_n of a row block does not change its norm). The official code walks
towards this minimum by Adam, from the sum. On the inputs that an adapter acts on, the merge acts as
that adapter: where the adapters use independent input directions, the loss is zero.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank min(p, q).

Paper: Cheng et al. 2025, arXiv:2503.08099 (WUDI-Merging).
Source: official code; the closed form is ours.
Deviates: the exact minimum of least norm. Weights are ours.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.engine.spectral_functions import dot, spectral, support
from jlora.merging.signs import absorbed
from jlora.merging.spectral.core_space import from_core, to_core


def wudi(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The minimiser of the interference of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.

    Returns:
      u [d_in, k], v [k, d_out], k = min(p, q).
    """
    bank, weights = absorbed(bank, weights)
    core = to_core(bank)
    rows, targets = interference(core.cores, weights)
    inverse = spectral(_inverse, rows).T
    return from_core(core, dot("pr,rq->pq", inverse, targets))


def interference(cores: Float[Array, "n p q"], weights: Float[Array, "n"]) -> tuple[Array, Array]:
    """The interference as a least-squares problem: the loss of C is |P C - Q|^2.

    Args:
      cores: of the adapters.
      weights: of their losses, >= 0.

    Returns:
      (P [N q, p], Q [N q, q]).
    """
    norm = jnp.sum(cores**2, axis=(1, 2))
    live = (norm > 0) & (weights > 0)
    one = jnp.ones_like(norm)
    c = jnp.where(live, jnp.sqrt(jnp.where(live, weights / jnp.where(live, norm, one), one)), 0)
    rows = c[:, None, None] * cores.mT
    targets = dot("nqp,npr->nqr", rows, cores)
    return rows.reshape(-1, cores.shape[1]), targets.reshape(-1, cores.shape[2])


def _inverse(s: Array) -> Array:
    live = support(s, 4 * s.shape[0])
    return live / jnp.where(live > 0, s, jnp.ones_like(s))


SYSTEM = Merging(
    name="wudi",
    paper="Cheng 2025, 2503.08099",
    symbol="wudi",
    claim="wudi",
    function=wudi,
    atol=0.001,
    breaks={
        "bounded": "opposite demands on nearly the same inputs have a large exact answer",
    },
    evidence="minimum of its loss against least squares; law suite",
)

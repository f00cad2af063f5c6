"""HetLoRA: clients of different ranks, padded and averaged with weights by the size of their delta.

===========  =========================================================================
u_k, v_k     factors of client k, zero-padded to a common rank
p_k          prior share of client k, 1 / N where there is none
S_k          Frobenius norm of its delta: a client that learned more counts more
gamma        share of a client's rank that self-pruning keeps
===========  =========================================================================

.. math:: w_k = \\frac{p_k S_k}{\\sum_j p_j S_j}, \\; S_k = \\|u_k v_k\\|_F, \\qquad
          \\bar u = \\sum_k w_k u_k, \\; \\bar v = \\sum_k w_k v_k

A client of rank r_k gets the first r_k columns of u and rows of v (`truncate`). Self-pruning keeps
the first floor(gamma r) of them where training has made the tail, the product of the norms of the
dropped parts, smaller than it was (`pruned_rank`); `tail` is also the penalty of local training.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, R], v [R, d_out].

Paper: Cho et al. 2024, arXiv:2401.06432.
Source: abstract and memory; not verified against the authors' equations.
Deviates: priors p_k (uniform: the paper's weights). All deltas zero: the priors alone.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.federated.fedavg import fedavg
from jlora.federated.flexlora import cut


def hetlora(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The padded average of one site, weighted by the norms of the deltas.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: prior shares p_k.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    return fedavg(bank, norm_weights(bank, weights))


def norm_weights(bank: LowRank, weights: Float[Array, "n"]) -> Array:
    """The weights w_k of the equation.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: prior shares p_k.

    Returns:
      [N], summing to 1.
    """
    left = jnp.einsum("nir,nis->nrs", bank.u, bank.u, precision=lax.Precision.HIGHEST)
    right = jnp.einsum("nro,nso->nrs", bank.v, bank.v, precision=lax.Precision.HIGHEST)
    squared = jnp.sum(left * right, axis=(-2, -1))
    live = squared > 0
    norms = jnp.where(live, jnp.sqrt(jnp.where(live, squared, jnp.ones_like(squared))), 0.0)
    w = weights.astype(norms.dtype) * jnp.where(jnp.any(live), norms, jnp.ones_like(norms))
    return w / jnp.sum(w)


def truncate(x: LowRank, ranks: Sequence[int]) -> LowRank:
    """What each client gets of the average, zeros beyond its rank.

    Args:
      x: u [d_in, R], v [R, d_out].
      ranks: of the clients, each in 1..R.

    Returns:
      u [N, d_in, R], v [N, R, d_out].

    Raises:
      ValueError: a rank out of range.
    """
    most = x.u.shape[-1]
    if min(ranks, default=0) < 1 or max(ranks) > most:
        raise ValueError(f"ranks: got {tuple(ranks)}, expected each in 1..{most}")
    return cut(x, ranks)


def tail(x: LowRank, keep: int) -> Array:
    """|u beyond column `keep`| times |v beyond row `keep`|; its gradient at zero is finite.

    Args:
      x: u [d_in, R], v [R, d_out].
      keep: leading ranks that do not count.

    Returns:
      [].
    """
    u, v = (jnp.sum(jnp.square(t)) for t in (x.u[:, keep:], x.v[keep:]))
    squared = u * v
    live = squared > 0
    return jnp.where(live, jnp.sqrt(jnp.where(live, squared, jnp.ones_like(squared))), 0.0)


def pruned_rank(before: LowRank, after: LowRank, *, rank: int, gamma: float = 0.99) -> Array:
    """The rank of a client after a round: floor(gamma rank), at least 1, or `rank`.

    Args:
      before: its factors at the start of the round.
      after: its factors at the end.
      rank: its rank, 1..R.
      gamma: share of the rank that pruning keeps, in (0, 1]; 0.99.

    Returns:
      [] int32.

    Raises:
      ValueError: gamma or rank out of range.
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma: got {gamma}, expected 0 < gamma <= 1")
    if not 1 <= rank <= after.u.shape[-1]:
        raise ValueError(f"rank: got {rank}, expected in 1..{after.u.shape[-1]}")
    keep = max(1, int(gamma * rank))
    shrunk = tail(after, keep) < tail(before, keep)
    return jnp.where(shrunk, jnp.int32(keep), jnp.int32(rank))


SYSTEM = Aggregation(
    name="HetLoRA",
    paper="Cho 2024, 2401.06432",
    symbol="hetlora",
    claim="hetlora",
    evidence="numpy value; idle clients do not dilute; self-pruning; mutation check",
    aggregate=lambda bank, weights: Round(hetlora(bank, weights)),
)

"""DO-Merging: deltas are pushed apart, then their magnitudes and directions are merged apart.

=========  ======================================================================
W_n        delta of adapter n, u_n v_n, [d_in, d_out]
m_n, D_n   its magnitude, the norm of each row [d_in], and its direction W_n / m_n
w_n        its weight
gamma      how dear it is to move a delta
=========  ======================================================================

First, without data, gradient descent on the overlap of the adapters on both sides,

.. math:: \\min_{\\hat W} \\sum_{i<j} \\|\\hat W_i^T \\hat W_j\\|^2 + \\|\\hat W_i \\hat W_j^T\\|^2
          + \\gamma \\sum_n \\|\\hat W_n - W_n\\|^2 ,

then the magnitudes are averaged and the directions are summed,

.. math:: m^* = \\frac{\\sum_n |w_n| m_n}{\\sum_n |w_n|}, \\quad D^* = \\sum_n w_n D_n, \\quad
          W^* = m^* \\odot D^* .

A step moves W_i by W_j W_j^T W_i, which is u_j times a small matrix times v_i: every step keeps
the factors, so descent runs on N R x N R coefficients, and nothing depends on the basis that an
adapter is written in. With `steps=0` only the decoupling is left.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, N R], v [N R, d_out].

Paper: Zheng et al. 2025, arXiv:2505.15875.
Source: abstract and notes on the paper; the constants are not known.
Deviates: the overlap is that of the deltas, one of two readings (the other, of the factors,
depends on their basis); one side after the other; all lengths relative to the bank's. A weight of
0 takes an adapter out; a row that is zero in an adapter has direction 0.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat
from jlora.merging.signs import without_absent
from jlora.numerics import einsum


def do_merging(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    steps: int = 100,
    rate: float = 0.5,
    gamma: float = 0.01,
) -> LowRank:
    """The merge of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; 0 leaves an adapter out.
      steps: of descent on each side, at least 0 (0: the decoupling alone); 100.
      rate: of descent, > 0, relative to the bank's squared norm; 0.5.
      gamma: how dear it is to move a delta, at least 0; 0.01.

    Returns:
      u [d_in, N R], v [N R, d_out].

    Raises:
      ValueError: steps, rate or gamma out of range.
    """
    if steps < 0 or rate <= 0 or gamma < 0:
        raise ValueError(
            f"steps, rate, gamma: got {steps}, {rate}, {gamma}, expected >= 0, > 0 and >= 0"
        )
    bank = without_absent(bank, weights)
    return decoupled(orthogonalised(bank, steps=steps, rate=rate, gamma=gamma), weights)


def decoupled(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """Magnitudes averaged, directions summed.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.

    Returns:
      u [d_in, N R], v [N R, d_out].
    """
    squared = jnp.sum(einsum("nir,nrs->nis", bank.u, _gram(bank.v.mT)) * bank.u, axis=-1)
    live = squared > 0
    m = jnp.where(live, jnp.sqrt(jnp.where(live, squared, jnp.ones_like(squared))), 0.0)
    size = jnp.abs(weights)
    total = jnp.sum(size)
    share = size / jnp.where(total > 0, total, jnp.ones_like(total))
    merged = einsum("n,ni->i", share, m)
    u = bank.u * jnp.where(live, merged[None, :] / jnp.where(live, m, 1.0), 0.0)[..., None]
    return concat(LowRank(u, bank.v), weights)


def orthogonalised(
    bank: LowRank, *, steps: int = 100, rate: float = 0.5, gamma: float = 0.01
) -> LowRank:
    """The bank after descent on both sides, of the same ranks.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      steps: of descent on each side, as in `do_merging`.
      rate: of descent, relative to the bank's squared norm, as in `do_merging`.
      gamma: how dear it is to move a delta, as in `do_merging`.

    Returns:
      u [N, d_in, R], v [N, R, d_out].
    """
    if not steps or bank.u.shape[0] == 1:
        return bank
    u = _apart(bank.u, _gram(bank.v.mT), steps, rate, gamma)
    v = _apart(bank.v.mT, _gram(u), steps, rate, gamma).mT
    return LowRank(u, v)


def overlap(bank: LowRank) -> tuple[Array, Array]:
    """How much the adapters of a bank share inputs and outputs.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].

    Returns:
      The sums of squared overlaps of inputs and of outputs, over |W|^4 of the bank.
    """
    norm = jnp.sum(_gram(bank.u) * _gram(bank.v.mT)) ** 2
    return tuple(  # type: ignore[return-value]
        _crossed(x, _gram(y)) / norm for x, y in ((bank.u, bank.v.mT), (bank.v.mT, bank.u))
    )


def _crossed(x: Array, metric: Array) -> Array:
    k = einsum("nir,mis->nmrs", x, x)
    squares = einsum("nmrs,mst->nmrt", k, metric) * einsum("npr,nmpt->nmrt", metric, k)
    apart = 1.0 - jnp.eye(x.shape[0], dtype=x.dtype)
    return jnp.sum(jnp.sum(squares, axis=(2, 3)) * apart) / 2


def _apart(x: Array, metric: Array, steps: int, rate: float, gamma: float) -> Array:
    """x [N, d, R] after descent, where the delta's other side has Gram matrix `metric` [N, R, R].

    Adapter i is X C_i with X [d, N R] all factors side by side and C the coefficients.
    """
    n, d, r = x.shape
    wide = jnp.moveaxis(x, 0, 1).reshape(d, n * r)
    size = jnp.sum(_gram(x) * metric)  # sum of |W_n|^2: no step can overshoot
    scale = 1.0 / jnp.where(size > 0, size, jnp.ones_like(size))
    k = einsum("dp,dq->pq", wide, wide) * scale
    block = jnp.kron(jnp.eye(n, dtype=x.dtype), jnp.ones((r, r), x.dtype))
    m = jnp.tile(metric.reshape(n * r, r), (1, n)) * block
    eye = jnp.eye(n * r, dtype=x.dtype)

    def step(c: Array, _: None) -> tuple[Array, None]:
        between = einsum("pa,pq,qb->ab", c, k, c) * (1.0 - block)
        slope = einsum("pa,ab,bc->pc", c, m, between) + gamma * (c - eye)
        return c - rate * slope, None

    c = lax.scan(step, eye, None, length=steps)[0]
    return jnp.moveaxis(einsum("dp,pq->dq", wide, c).reshape(d, n, r), 1, 0)


def _gram(x: Array) -> Array:
    return einsum("nir,nis->nrs", x, x)


SYSTEMS = (
    Merging(
        name="do_merging",
        paper="Zheng 2025, 2505.15875",
        symbol="do_merging",
        claim="do_merging",
        function=do_merging,
        breaks={
            "idempotent": "equal adapters overlap, and are pushed apart",
        },
        evidence="descent and decoupling by dense numpy; a loud adapter keeps no direction",
        rows=(47,),
    ),
    Merging(
        name="do_decoupled",
        paper="Zheng 2025, 2505.15875",
        symbol="decoupled",
        claim="do_decoupled",
        function=decoupled,
        evidence="numpy value; the direction does not see the scale of an adapter",
        rows=(47,),
    ),
)

"""PEFT's merges of dW with a truncated SVD, without a dense dW.

=========  ==================================================================
D_n        delta of adapter n, scale folded in, [d_in, d_out]
w_n        its weight
P          keep the floor(density * d_in * d_out) largest elements of each delta
m_n        random mask of adapter n, rescaled by 1 / density
s          sign of the unweighted sum (or of the count of signs)
=========  ==================================================================

.. math::
    M_{svd} = \\sum_n w_n D_n, \\quad M_{prune} = \\sum_n w_n P(D_n), \\quad
    M_{ties} = \\frac{\\sum_n a_n w_n P(D_n)}{\\sum_n a_n}, \\quad a_n = [\\text{sgn} P(D_n) = s]

dare_linear and dare_ties have m_n D_n for P(D_n). All end with the best rank-`rank` part: U the
right singular vectors of PEFT's (out, in) matrix, V the left ones times the singular values.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out];
`rank` is R (or full, if that is less) where it is None, as in PEFT.

Raises ValueError for a density outside (0, 1], an unknown vote, a rank out of range.

Reference: `add_weighted_adapter` of PEFT 0.21.2; tested on its models.
Deviates: equal to PEFT's product, not its bits (another SVD; signs of singular vectors are free),
so `svd_clamp`, which depends on those signs, is not offered. `density` 1 prunes nothing.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jlora.algebra import LowRank
from jlora.merging.elementwise.dare import dropping
from jlora.merging.elementwise.ties import trimmed
from jlora.merging.engine.election import spread, weighted
from jlora.merging.engine.record import BLIND_VOTE, DROPPED, TRIMMED, Merging
from jlora.merging.engine.streamed import Rule, Solver, factor
from jlora.merging.exact.truncated import truncated, truncation_error
from jlora.merging.peft.factors import VOTES
from jlora.types import Dynamic


def peft_svd(bank: LowRank, weights: Float[Array, "n"], *, rank: int | None = None) -> LowRank:
    """`combination_type="svd"`, by the core SVD: exact.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      rank: of the result; None: R, as PEFT's largest rank.

    Returns:
      u [d_in, rank], v [rank, d_out].
    """
    return truncated(bank, weights, rank=_rank(bank, rank))


def peft_svd_error(bank: LowRank, weights: Float[Array, "n"], *, rank: int | None = None) -> Array:
    """The Frobenius norm of what `peft_svd` cuts off; exact.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      rank: of the result; None: R.

    Returns:
      [].
    """
    return truncation_error(bank, weights, rank=_rank(bank, rank))


def peft_magnitude_prune_svd(
    bank: LowRank, weights: Float[Array, "n"], *, density: float = 0.5, rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """`combination_type="magnitude_prune_svd"`: the weighted sum of pruned deltas.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      density: share of the elements of a delta that is kept, in (0, 1]; 0.5 (PEFT has no default).
      rank: of the result; None: R, as PEFT's largest rank.
      solver: how the merged matrix is read, by row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank], v [rank, d_out].
    """
    trim = trimmed(bank, density)
    return _factor(bank, lambda d, numbers: weighted(trim(d, numbers), weights), rank, solver)


def peft_ties_svd(
    bank: LowRank, weights: Float[Array, "n"], *, density: float = 0.5, vote: str = "total",
    rank: int | None = None, solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """`combination_type="ties_svd"`: pruned deltas, of which those of the majority's sign are
    averaged.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      density: share of the elements of a delta that is kept, in (0, 1]; 0.5 (PEFT has no default).
      vote: "total", PEFT's default, or "frequency".
      rank: of the result; None: R, as PEFT's largest rank.
      solver: how the merged matrix is read, by row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank], v [rank, d_out].
    """
    trim = trimmed(bank, density)
    return _factor(
        bank, lambda d, numbers: _disjoint(trim(d, numbers), weights, vote), rank, solver
    )


def peft_dare_linear_svd(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: float = 0.5,
    rank: int | None = None,
    masks: Float[Array, "n d_in d_out"] | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """`combination_type="dare_linear_svd"`: the weighted sum of randomly dropped deltas.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      keys: one for each adapter, of the masks.
      density: share that is kept, in (0, 1]; 0.5 (PEFT has no default).
      rank: of the result; None: R, as PEFT's largest rank.
      masks: 0 and 1, instead of the keys; None: drawn.
      solver: how the merged matrix is read, by row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank], v [rank, d_out].
    """
    drop = _drop(bank, density, keys, masks)
    return _factor(bank, lambda d, numbers: weighted(drop(d, numbers), weights), rank, solver)


def peft_dare_ties_svd(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: float = 0.5,
    vote: str = "total",
    rank: int | None = None,
    masks: Float[Array, "n d_in d_out"] | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """`combination_type="dare_ties_svd"`: as "ties_svd", of randomly dropped deltas.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      keys: one for each adapter, of the masks.
      density: share that is kept, in (0, 1]; 0.5 (PEFT has no default).
      vote: "total", PEFT's default, or "frequency".
      rank: of the result; None: R, as PEFT's largest rank.
      masks: 0 and 1, instead of the keys; None: drawn.
      solver: how the merged matrix is read, by row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank], v [rank, d_out].
    """
    drop = _drop(bank, density, keys, masks)

    def rule(d: Array, numbers: Array) -> Array:
        return _disjoint(drop(d, numbers), weights, vote)

    return _factor(bank, rule, rank, solver)


def _factor(bank: LowRank, rule: Rule, rank: int | None, solver: Solver | None) -> LowRank:
    return factor(bank, rule, _rank(bank, rank), solver)


def _rank(bank: LowRank, rank: int | None) -> int:
    """That of the adapters, at most full, where none is given."""
    return min(bank.u.shape[-1], bank.u.shape[-2], bank.v.shape[-1]) if rank is None else rank


def _disjoint(x: Array, weights: Array, vote: str) -> Array:
    if vote not in VOTES:
        raise ValueError(f"vote: got {vote!r}, expected one of {VOTES}")
    tally = jnp.sum(x if vote == "total" else jnp.sign(x), axis=0)
    winner = jnp.where(tally >= 0, jnp.ones_like(tally), -jnp.ones_like(tally))
    agree = (jnp.sign(x) == winner[None]).astype(x.dtype)
    number = jnp.maximum(jnp.sum(agree, axis=0), 1.0)
    return jnp.sum(spread(weights, x) * x * agree, axis=0) / number


def _drop(bank: LowRank, density: float, keys: Array, masks: Array | None) -> Dynamic:
    if masks is None:
        return dropping(bank, density, keys)
    p = jnp.asarray(density, bank.u.dtype)
    return lambda d, numbers: d * masks[:, numbers] / p


SYSTEMS = (
    Merging(
        name="peft_svd",
        paper="Mangrulkar 2022, PEFT 0.21.2",
        symbol="peft_svd",
        claim="peft_svd",
        function=peft_svd,
        kind="composition",
        loop="map",
        certificate=peft_svd_error,
        tight=True,
        evidence="PEFT's product on its own models",
        tests=("tests/merging/peft/peft_torch_test.py",),
    ),
    Merging(
        name="peft_magnitude_prune_svd",
        paper="Mangrulkar 2022, PEFT 0.21.2",
        symbol="peft_magnitude_prune_svd",
        claim="peft_magnitude_prune_svd",
        function=peft_magnitude_prune_svd,
        kind="composition",
        loop="map",
        options={"density": 0.5},
        breaks={
            "weight_one": TRIMMED,
            "idempotent": TRIMMED,
            "difference": "ranks beyond an adapter's are cut off: what they add to the derivative "
            "is left out",
        },
        evidence="PEFT's product on its own models",
        tests=("tests/merging/peft/peft_torch_test.py",),
    ),
    Merging(
        name="peft_ties_svd",
        paper="Mangrulkar 2022, PEFT 0.21.2",
        symbol="peft_ties_svd",
        claim="peft_ties_svd",
        function=peft_ties_svd,
        kind="composition",
        loop="map",
        options={"density": 0.5},
        breaks={
            "weight_one": TRIMMED,
            "idempotent": "PEFT divides by the number of adapters that agree: N copies of weight "
            "1/N give 1/N of one",
            "signs": BLIND_VOTE,
            "absent": BLIND_VOTE,
            "difference": "ranks beyond an adapter's are cut off: what they add to the derivative "
            "is left out",
        },
        evidence="PEFT's product on its own models",
        tests=("tests/merging/peft/peft_torch_test.py",),
    ),
    Merging(
        name="peft_dare_linear_svd",
        paper="Mangrulkar 2022, PEFT 0.21.2",
        symbol="peft_dare_linear_svd",
        claim="peft_dare_linear_svd",
        function=peft_dare_linear_svd,
        kind="composition",
        randomised=True,
        loop="map",
        options={"density": 0.5},
        breaks={
            "weight_one": DROPPED,
            "idempotent": DROPPED,
            "difference": "ranks beyond an adapter's are cut off: what they add to the derivative "
            "is left out",
        },
        evidence="PEFT's product on its own models",
        tests=("tests/merging/peft/peft_torch_test.py",),
    ),
    Merging(
        name="peft_dare_ties_svd",
        paper="Mangrulkar 2022, PEFT 0.21.2",
        symbol="peft_dare_ties_svd",
        claim="peft_dare_ties_svd",
        function=peft_dare_ties_svd,
        kind="composition",
        randomised=True,
        loop="map",
        options={"density": 0.5},
        breaks={
            "weight_one": DROPPED,
            "idempotent": "PEFT divides by the number of adapters that agree: N copies of weight "
            "1/N give 1/N of one",
            "signs": BLIND_VOTE,
            "absent": BLIND_VOTE,
            "difference": "ranks beyond an adapter's are cut off: what they add to the derivative "
            "is left out",
        },
        evidence="PEFT's product on its own models",
        tests=("tests/merging/peft/peft_torch_test.py",),
    ),
)

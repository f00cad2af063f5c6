"""PEFT's merges of the factors themselves, to its last bit; to reproduce, not to recommend.

=========  ========================================================================
A_n, B_n   factors [d_in, r], [r, d_out]; PEFT's lora_A^T, lora_B^T
w_n, s_n   weight and scale (alpha / r) of adapter n
c_n        sqrt |w_n s_n|; A also takes the sign of w_n s_n
h          weighted sum, or one of the variants below, of A and of B apart
=========  ========================================================================

.. math::
    A' = h(\\pm c_n, A_n), \\quad B' = h(c_n, B_n); \\qquad h_{linear}(c, x) = \\sum_n c_n x_n

magnitude_prune and ties keep the largest elements of each x_n; ties then keeps those of the sign
of the unweighted sum (or of the count of signs) and divides by how many those are; dare_* drop
at random and rescale. cat is the exact sum: A' = [w_n s_n A_n], B' = [B_n].

Except for cat the result has cross terms B_n A_m and depends on the gauge: merging an adapter with
itself at weights 1/2, 1/2 gives twice the adapter. The scales are 1 where the factors of a bank
hold them already, as those of `gather` do; `peft_merge` reads factors and scales apart, as PEFT.

Shapes: bank u [N, d_in, r], v [N, r, d_out]; weights [N]; result u [d_in, r], v [r, d_out].

Raises ValueError for a density outside (0, 1], an unknown vote, neither keys nor masks.

Reference: `add_weighted_adapter` of PEFT 0.21.2; tested on its models.
Deviates: of elements equal to the threshold all are kept. torch adds the last few elements of
banks of 8 and more in another order: there the last bit may differ.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Key

from jlora.algebra import LowRank
from jlora.merging.elementwise.dare import shares
from jlora.merging.engine.record import (
    AS_WRITTEN,
    BLIND_VOTE,
    DROPPED,
    SUMMED_APART,
    TRIMMED,
    Merging,
)
from jlora.merging.engine.threshold import kept
from jlora.merging.exact.concat import concat
from jlora.types import Dynamic

VOTES = ("total", "frequency")
Roots = tuple[Array, Array] | None  # (± c, c), each [N]; from the weights alone where it is None


def peft_linear(bank: LowRank, weights: Float[Array, "n"], *, roots: Roots = None) -> LowRank:
    """`combination_type="linear"`: weighted sums of A and of B.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      roots: c_n of A and of B; None: taken from the weights in float32.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    return _both(bank, weights, roots, total)


def peft_cat(
    bank: LowRank, weights: Float[Array, "n"], *, scales: Float[Array, "n"] | None = None
) -> LowRank:
    """`combination_type="cat"`: factors side by side.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      scales: s_n, multiplied after the weights; None: all 1, they are folded in.

    Returns:
      u [d_in, N R], v [N R, d_out].
    """
    low = LowRank(bank.u * weights[:, None, None], bank.v)
    return concat(low, jnp.ones_like(weights) if scales is None else scales)


def peft_magnitude_prune(
    bank: LowRank, weights: Float[Array, "n"], *, density: float = 0.5, roots: Roots = None
) -> LowRank:
    """`combination_type="magnitude_prune"`: weighted sums of pruned factors.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      density: share of the elements of a factor that is kept, in (0, 1]; 0.5 (PEFT has no default).
      roots: c_n of A and of B; None: taken from the weights in float32.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    return _both(bank, weights, roots, lambda x, c: total(pruned(x, density), c))


def peft_ties(
    bank: LowRank, weights: Float[Array, "n"], *, density: float = 0.5, vote: str = "total",
    roots: Roots = None,
) -> LowRank:  # fmt: skip
    """`combination_type="ties"`: pruned factors, of which those of the majority's sign are
    averaged.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      density: share of the elements of a factor that is kept, in (0, 1]; 0.5 (PEFT has no default).
      vote: "total", PEFT's default, or "frequency".
      roots: c_n of A and of B; None: taken from the weights in float32.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    return _both(bank, weights, roots, lambda x, c: disjoint(pruned(x, density), c, vote))


def peft_dare_linear(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    density: float = 0.5,
    keys: Key[Array, "n"] | None = None,
    masks: LowRank | None = None,
    roots: Roots = None,
) -> LowRank:
    """`combination_type="dare_linear"`: weighted sums of randomly dropped factors.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      density: share that is kept, in (0, 1]; 0.5 (PEFT has no default).
      keys: of the masks; None: `masks` are given.
      masks: 0 and 1, shaped as the bank; None: drawn from `keys`.
      roots: c_n of A and of B; None: taken from the weights in float32.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    return _both(_dropped(bank, density, keys, masks), weights, roots, total)


def peft_dare_ties(
    bank: LowRank, weights: Float[Array, "n"], *, density: float = 0.5, vote: str = "total",
    keys: Key[Array, "n"] | None = None, masks: LowRank | None = None, roots: Roots = None,
) -> LowRank:  # fmt: skip
    """`combination_type="dare_ties"`: as "ties", of randomly dropped factors.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      density: share that is kept, in (0, 1]; 0.5 (PEFT has no default).
      vote: "total", PEFT's default, or "frequency".
      keys: of the masks; None: `masks` are given.
      masks: 0 and 1, shaped as the bank; None: drawn from `keys`.
      roots: c_n of A and of B; None: taken from the weights in float32.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    low = _dropped(bank, density, keys, masks)
    return _both(low, weights, roots, lambda x, c: disjoint(x, c, vote))


def total(x: Float[Array, "n p q"], c: Float[Array, "n"]) -> Array:
    """sum_n c_n x_n, each product rounded before it is added, in order.

    Args:
      x: factors.
      c: coefficients.

    Returns:
      [p, q].
    """
    return _sum(c[:, None, None] * x)


def pruned(x: Float[Array, "n p q"], density: float) -> Array:
    """Factors with their largest elements alone.

    Args:
      x: factors.
      density: floor(density p q) elements of each are kept, in (0, 1].

    Returns:
      [N, p, q].
    """
    n, size = x.shape[0], x.shape[1] * x.shape[2]
    kept(density, n, size)
    if density == 1.0:
        return x
    flat = jnp.abs(x).reshape(n, size)
    low = lax.top_k(lax.stop_gradient(flat), int(density * size))[0][:, -1:]
    return jnp.where((flat >= low).reshape(x.shape), x, jnp.zeros_like(x))


def disjoint(x: Float[Array, "n p q"], c: Float[Array, "n"], vote: str) -> Array:
    """The elements of the majority's sign, weighted, over their number.

    Args:
      x: factors.
      c: coefficients.
      vote: "total" or "frequency".

    Returns:
      [p, q].

    Raises:
      ValueError: another vote.
    """
    if vote not in VOTES:
        raise ValueError(f"vote: got {vote!r}, expected one of {VOTES}")
    tally = _sum(x if vote == "total" else jnp.sign(x))
    winner = jnp.where(tally >= 0, jnp.ones_like(tally), -jnp.ones_like(tally))
    agree = (jnp.sign(x) == winner[None]).astype(x.dtype)
    return _sum(c[:, None, None] * x * agree) / jnp.maximum(_sum(agree), 1.0)


def _sum(x: Array) -> Array:
    """In order: a scan keeps the compiler from fusing the product before it into the sum."""
    return lax.scan(lambda t, y: (t + y, None), jnp.zeros_like(x[0]), x)[0]


def _both(bank: LowRank, weights: Array, roots: Roots, h: Dynamic) -> LowRank:
    if roots is None:
        size = jnp.abs(weights)
        root = jnp.where(size > 0, jnp.sqrt(jnp.where(size > 0, size, jnp.ones_like(size))), size)
        roots = jnp.where(weights >= 0, root, -root), root
    return LowRank(h(bank.u, roots[0]), h(bank.v, roots[1]))


def _dropped(bank: LowRank, density: float, keys: Array | None, masks: Dynamic) -> LowRank:
    shares(density, 1)
    if density == 1.0:
        return bank
    if masks is None:
        if keys is None:
            raise ValueError("keys, masks: got neither, expected one")
        masks = LowRank(_mask(keys, 0, density, bank.u), _mask(keys, 1, density, bank.v))

    def drop(x: Array, mask: Array) -> Array:  # by an array: x / p would become x * (1 / p)
        p = jnp.asarray(density, x.dtype)
        return x * mask / jnp.where(mask > 0, p, jnp.ones_like(x))

    return LowRank(*map(drop, bank, masks))


def _mask(keys: Array, side: int, density: float, like: Array) -> Array:
    def one(key: Array) -> Array:
        share = jnp.asarray(density, jnp.float32)
        return jax.random.bernoulli(jax.random.fold_in(key, side), share, like.shape[1:])

    return jax.vmap(one)(keys).astype(like.dtype)


def _record(
    function: Callable[..., LowRank],
    breaks: Mapping[str, str],
    options: Mapping[str, float] | None = None,
    randomised: bool = False,
) -> Merging:
    name = function.__name__
    return Merging(
        name=name,
        paper="Mangrulkar 2022, PEFT 0.21.2",
        symbol=name,
        claim=name,
        function=function,
        kind="composition",
        randomised=randomised,
        options=options or {},
        breaks=breaks,
        evidence="PEFT's bits on its own models; numpy value",
        tests=("tests/merging/peft/peft_torch_test.py",),
    )


_APART = {"idempotent": SUMMED_APART, "gauge": AS_WRITTEN}
_VOTE = {"signs": BLIND_VOTE, "absent": BLIND_VOTE}
_HALF = {"density": 0.5}
SYSTEMS = (
    _record(peft_linear, _APART),
    _record(peft_cat, {}),
    _record(peft_magnitude_prune, {**_APART, "weight_one": TRIMMED}, _HALF),
    _record(peft_ties, {**_APART, "weight_one": TRIMMED, **_VOTE}, _HALF),
    _record(peft_dare_linear, {**_APART, "weight_one": DROPPED}, _HALF, randomised=True),
    _record(peft_dare_ties, {**_APART, "weight_one": DROPPED, **_VOTE}, _HALF, randomised=True),
)

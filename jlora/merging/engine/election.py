"""The vote over signs: of N values of one element, those of the winning sign are averaged.

=====  ==================================================
x_n    elements [N, ...], already sparsified
w_n    weights [N], of any sign
s      the elected sign, +1 where the vote is a draw
a_n    whether adapter n agrees: sign(w_n x_n) = s
=====  ==================================================

.. math::
    s = \\text{sgn} \\sum_n w_n x_n \\;\\text{ or }\\; \\text{sgn} \\sum_n \\text{sgn}(w_n x_n),
    \\qquad y = \\frac{\\sum_n a_n w_n x_n}{\\sum_n a_n |w_n|}

A zero never agrees. Without `normalize` the denominator is 1; where it is 0, y is the numerator.
A negative weight subtracts its adapter: it is the adapter -x_n with the weight |w_n|. So y is a
mean of values |x_n| with the elected sign, whatever the weights are.

Paper: TIES, Yadav et al. 2023, arXiv:2306.01708 (elect and disjoint mean).
Source: paper; the weighted form is that of mergekit's generalised task arithmetic (formula only).
Deviates: mergekit divides by the sum of the weights themselves. Where they are not negative that
is the same; for weights [1, -0.999] that sum is 0.001 where both agree, and for [-1] it turns the
sign of the result.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jlora.merging.engine.streamed import Sparsify

VOTES = ("sum", "count")


def elect(
    x: Float[Array, "n ..."],
    weights: Float[Array, "n"],
    *,
    vote: str = "sum",
    normalize: bool = True,
) -> Array:
    """The merged elements.

    Args:
      x: [N, ...], the elements of N adapters.
      weights: [N], of any sign.
      vote: "sum" counts a voice by its size, "count" each voice alike.
      normalize: divide by the sum of |w_n| of those that agree (the paper's disjoint mean).

    Returns:
      [...], of the dtype of x.

    Raises:
      ValueError: an unknown vote.
    """
    if vote not in VOTES:
        raise ValueError(f"vote: got {vote!r}, expected one of {VOTES}")
    w = spread(weights, x)
    y = w * x
    agree = (jnp.sign(y) == majority(y, vote)[None]).astype(x.dtype)
    total = jnp.sum(y * agree, axis=0)
    if not normalize:
        return total
    share = jnp.sum(jnp.abs(w) * agree, axis=0)
    return total / jnp.where(share == 0, jnp.ones_like(share), share)


def majority(y: Float[Array, "n ..."], vote: str) -> Array:
    """The elected sign of each element.

    Args:
      y: elements, times their weights.
      vote: "sum" or "count", as in `elect`.

    Returns:
      [...], +1 or -1.
    """
    tally = jnp.sum(y if vote == "sum" else jnp.sign(y), axis=0)
    return jnp.where(tally >= 0, jnp.ones_like(tally), -jnp.ones_like(tally))


def weighted(x: Float[Array, "n ..."], weights: Float[Array, "n"]) -> Array:
    """The weighted sum over the adapters.

    Args:
      x: elements.
      weights: of any sign.

    Returns:
      sum_n w_n x_n, [...].
    """
    return jnp.sum(spread(weights, x) * x, axis=0)


def shared(weights: Float[Array, "n"], normalize: bool) -> Array:
    """The weights of a sum.

    Args:
      weights: of any sign.
      normalize: divide by sum |w_n| (by 1 where that is 0).

    Returns:
      [N].
    """
    if not normalize:
        return weights
    total = jnp.sum(jnp.abs(weights))
    return weights / jnp.where(total == 0, jnp.ones_like(total), total)


def signed(x: Float[Array, "n ..."], weights: Float[Array, "n"]) -> Array:
    """The elements with the signs of the weights: what a weight |w_n| is then the weight of.

    Args:
      x: elements.
      weights: of any sign.

    Returns:
      As x.
    """
    return jnp.where(spread(weights, x) < 0, -x, x)


def spread(weights: Float[Array, "n"], x: Float[Array, "n ..."]) -> Array:
    """The weights in the shape that broadcasts over the elements.

    Args:
      weights: one per adapter.
      x: elements, whose dtype the result has.

    Returns:
      [N, 1, ..., 1].
    """
    return weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def voted(
    sparsify: Sparsify,
    weights: Float[Array, "n"],
    scale: Float[Array, ""] | float,
    d: Float[Array, "n b d_out"],
    numbers: Int[Array, "b"],
    *,
    vote: str,
    normalize: bool,
) -> Array:
    """A block of scale * elect(w, sparsify(d)); for `partial`.

    Args:
      sparsify: deltas and row numbers to sparse deltas.
      weights: of any sign.
      scale: lambda.
      d: rows of all deltas.
      numbers: the numbers of those rows.
      vote: as in `elect`.
      normalize: as in `elect`.

    Returns:
      [b, d_out].
    """
    return scale * elect(sparsify(d, numbers), weights, vote=vote, normalize=normalize)


def summed(
    sparsify: Sparsify,
    weights: Float[Array, "n"],
    scale: Float[Array, ""] | float,
    d: Float[Array, "n b d_out"],
    numbers: Int[Array, "b"],
) -> Array:
    """A block of scale * sum_n w_n sparsify(d)_n; for `partial`.

    Args:
      sparsify: deltas and row numbers to sparse deltas.
      weights: of any sign.
      scale: lambda.
      d: rows of all deltas.
      numbers: the numbers of those rows.

    Returns:
      [b, d_out].
    """
    return scale * weighted(sparsify(d, numbers), weights)


def everything(d: Float[Array, "n b d_out"], numbers: Int[Array, "b"]) -> Array:
    """The sparsification that keeps all.

    Args:
      d: rows of all deltas.
      numbers: not used.

    Returns:
      d.
    """
    return d

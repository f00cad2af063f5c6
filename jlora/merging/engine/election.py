"""The vote over signs: of N values of one element, those of the winning sign are averaged.

=====  ==================================================
x_n    elements [N, ...], already sparsified
w_n    weights [N]
s      the elected sign, +1 where the vote is a draw
a_n    whether adapter n agrees: sign(w_n x_n) = s
=====  ==================================================

.. math::
    s = \\text{sgn} \\sum_n w_n x_n \\;\\text{ or }\\; \\text{sgn} \\sum_n \\text{sgn}(w_n x_n),
    \\qquad y = \\frac{\\sum_n a_n w_n x_n}{\\sum_n a_n w_n}

A zero never agrees. Without `normalise` the denominator is 1; where it is 0, y is the numerator.

Paper: TIES, Yadav et al. 2023, arXiv:2306.01708 (elect and disjoint mean).
Source: paper; the weighted form is that of mergekit's generalised task arithmetic (formula only).
Deviates: nothing.
"""

import jax.numpy as jnp
from jax import Array

VOTES = ("sum", "count")


def elect(x: Array, weights: Array, *, vote: str = "sum", normalise: bool = True) -> Array:
    """The merged elements [...] of x [N, ...].

    Raises ValueError for an unknown vote.
    """
    if vote not in VOTES:
        raise ValueError(f"vote: got {vote!r}, expected one of {VOTES}")
    w = spread(weights, x)
    y = w * x
    agree = (jnp.sign(y) == majority(y, vote)[None]).astype(x.dtype)
    total = jnp.sum(y * agree, axis=0)
    if not normalise:
        return total
    share = jnp.sum(w * agree, axis=0)
    return total / jnp.where(share == 0, jnp.ones_like(share), share)


def majority(y: Array, vote: str) -> Array:
    """The elected sign [...] of y [N, ...]: +1 or -1."""
    tally = jnp.sum(y if vote == "sum" else jnp.sign(y), axis=0)
    return jnp.where(tally >= 0, jnp.ones_like(tally), -jnp.ones_like(tally))


def weighted(x: Array, weights: Array) -> Array:
    """sum_n w_n x_n."""
    return jnp.sum(spread(weights, x) * x, axis=0)


def spread(weights: Array, x: Array) -> Array:
    """[N] as [N, 1, ..., 1]."""
    return weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

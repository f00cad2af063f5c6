"""RobustMerge: pruned and rescaled factors against the tuned sum of deltas."""

import jax.numpy as jnp

from experiments.claims import text_merges
from jlora import merging


def robust_merge(adapters, weights, key):
    """At the official weights, 2 each: both factors are multiplied, so 1/T would be 1/(2T)^2."""
    twice = jnp.full_like(weights, 2.0)
    options = {"density": 0.2, "floor": 0.8}
    return merging.merge("robust_merge", adapters, twice, options=options)


CLAIM = text_merges.claim(
    name="robust_merge",
    systems=("robust_merge",),
    method="robust_merge",
    reference="Zeng 2025, 2502.17159: better than task arithmetic for parameter-efficient modules",
    merge=robust_merge,
)

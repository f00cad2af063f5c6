"""Random masks over the elements of deltas that do not depend on how rows are blocked or sharded.

=======  ==============================================================
e_nij    16 random bits of adapter n, row i, column j, from key n and i
p        keep probability, rounded to a multiple of 2^-16
=======  ==============================================================

.. math:: m_{nij} = [\\, e_{nij} < 2^{16} p \\,] / p, \\qquad E\\, m = 1

Row i of adapter n is drawn from `fold_in(keys[n], i)`: the same in any block, on any device.

Deviates: one word of random bits serves two columns; p is rounded, and so is the rescaling, so
that the mean is exact.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

STEPS = 2**16


def words(keys: Array, numbers: Array, columns: int) -> Array:
    """Random bits [N, b, columns] uint16 of the rows `numbers` [b]; keys [N]."""

    def row(key: Array, i: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(key, i), (-(-columns // 2),), jnp.uint32)
        return lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:columns]

    return jax.vmap(lambda key: jax.vmap(lambda i: row(key, i))(numbers))(keys)


def steps(keep: Array) -> Array:
    """Probabilities as multiples of 2^-16, uint32; those that would be 0 become 1."""
    return jnp.clip(jnp.round(keep * STEPS), 1.0, float(STEPS)).astype(jnp.uint32)


def dropped(d: Array, keep: Array, keys: Array, numbers: Array, rescale: bool = True) -> Array:
    """Deltas [N, b, c] kept with probabilities `keep` [N, b, c] or [N, 1, 1], and rescaled."""
    p = steps(keep)
    mask = words(keys, numbers, d.shape[-1]).astype(jnp.uint32) < p
    kept = jnp.where(mask, d, jnp.zeros_like(d))
    return kept * (STEPS / p.astype(d.dtype)) if rescale else kept

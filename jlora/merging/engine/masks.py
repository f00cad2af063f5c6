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
from jaxtyping import Float, Int, Key

STEPS = 2**16


def words(keys: Key[Array, "n"], numbers: Int[Array, "b"], columns: int) -> Array:
    """Random bits of some rows.

    Args:
      keys: one for each adapter.
      numbers: the rows.
      columns: how many bits words a row has.

    Returns:
      [N, b, columns] uint16.
    """

    def row(key: Array, i: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(key, i), (-(-columns // 2),), jnp.uint32)
        return lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:columns]

    return jax.vmap(lambda key: jax.vmap(lambda i: row(key, i))(numbers))(keys)


def steps(keep: Float[Array, "..."]) -> Array:
    """Probabilities as multiples of 2^-16; those that would be 0 become 1.

    Args:
      keep: probabilities, in (0, 1].

    Returns:
      [...] uint32.
    """
    return jnp.clip(jnp.round(keep * STEPS), 1.0, float(STEPS)).astype(jnp.uint32)


def dropped(
    d: Float[Array, "n b c"],
    keep: Float[Array, "n ..."],
    keys: Key[Array, "n"],
    numbers: Int[Array, "b"],
    rescale: bool = True,
) -> Array:
    """Deltas of which elements are kept at random.

    Args:
      d: the deltas.
      keep: probabilities [N, b, c] or [N, 1, 1].
      keys: one for each adapter.
      numbers: the numbers of the rows.
      rescale: divide what is kept by its probability; True, so that the mean is d.

    Returns:
      [N, b, c].
    """
    p = steps(keep)
    mask = words(keys, numbers, d.shape[-1]).astype(jnp.uint32) < p
    kept = jnp.where(mask, d, jnp.zeros_like(d))
    return kept * (STEPS / p.astype(d.dtype)) if rescale else kept

"""The k-th largest magnitude of a matrix that is only seen by row blocks, exactly.

=======  ====================================================================
D_n      deltas [d_in, d_out], n = 1..N, streamed
g        the statistic: deltas [N, ..., c] -> [M, ..., c] >= 0 (magnitude, variance)
k_m      how many elements of statistic m are kept
t_m      the threshold
=======  ====================================================================

.. math:: t = \\max \\{ t : |\\{ij : g(D)_{ij} \\ge t\\}| \\ge k \\}

or any t above it that keeps exactly k elements. A random sample brackets t; then each pass counts
the elements above `WAYS` thresholds, equally spaced in the order of float32 numbers, and narrows
the bracket to one part in 17. About four passes; at most eight more if the sample misleads.

Original to jlora (selection by counting; float32 >= 0 are ordered as their bits are).
Deviates: elements that are equal to the threshold are all kept (a top-k picks some of them).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jlora.algebra import LowRank
from jlora.merging.engine.streamed import fold
from jlora.types import Dynamic, Tree

Density = float | Sequence[float] | Float[Array, "*n"]  # a share, or one for each adapter
Statistic = Callable[[Array], Array]  # [N, ..., c] -> [M, ..., c], elementwise in the last axes
WAYS, SAMPLE = 16, 1024
NORMAL, INFINITY = 0x00800000, 0x7F800000  # the bits of the smallest normal float32, and of inf


def magnitude(d: Float[Array, "n ... c"]) -> Array:
    """|D|, the statistic of TIES and of magnitude pruning.

    Args:
      d: deltas.

    Returns:
      [N, ..., c].
    """
    return jnp.abs(d)


def kept(density: Density, adapters: int, elements: int) -> Array:
    """How many elements a density keeps, rounded down.

    Args:
      density: in (0, 1]; a number, one for each adapter, or a traced array (which is not checked).
      adapters: N.
      elements: of each delta.

    Returns:
      [N] int32.

    Raises:
      ValueError: a density outside (0, 1], one that keeps nothing, or the wrong number of them.
    """
    if isinstance(density, jax.Array):
        k = jnp.floor(density * elements).astype(jnp.int32)
        return jnp.broadcast_to(k, (adapters,))
    many = isinstance(density, Sequence | np.ndarray)
    values = [float(x) for x in density] if many else [float(density)] * adapters
    if len(values) != adapters:
        raise ValueError(f"density: got {len(values)} values, expected {adapters}")
    for x in values:
        if not 0.0 < x <= 1.0 or int(x * elements) < 1:
            raise ValueError(f"density: got {x}, expected in (0, 1] and to keep an element")
    return jnp.asarray([int(x * elements) for x in values], jnp.int32)


def is_one(density: Density) -> bool:
    """Whether nothing is dropped, known without values of traced arrays.

    Args:
      density: a number, one for each adapter, or an array.

    Returns:
      False for a traced array.
    """
    return not isinstance(density, jax.Array) and bool(np.all(np.asarray(density) == 1.0))


def kth_largest(
    bank: LowRank, statistic: Statistic, k: Int[Array, "m"], *, block: int | None = None
) -> Array:
    """The thresholds so that k_m elements of statistic m are at or above.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      statistic: deltas [N, ..., c] to [M, ..., c] >= 0.
      k: elements that are kept, 1..size.
      block: rows at a time; None: as many as the solver takes.

    Returns:
      [M] float32.
    """
    bank = lax.stop_gradient(bank)
    first = _bits(_sampled(bank, statistic, k))
    m = k.shape[0]

    def count(at: Array) -> Array:  # [M, WAYS] bits -> how many are >= it
        cut = lax.bitcast_convert_type(at, jnp.float32)

        def step(carry: Array, d: Array, numbers: Array, along: Dynamic) -> Array:
            x = statistic(d).astype(jnp.float32)
            above = [(x >= cut[:, j, None, None]).sum(1, dtype=jnp.int32) for j in range(WAYS)]
            return carry + jnp.stack(above).sum(-1, dtype=jnp.int32).T

        return fold(bank, step, jnp.zeros((m, WAYS), jnp.int32), block)

    def step(state: Tree) -> Dynamic:
        low, high, at, value, done = state
        n = count(at)
        enough = n >= k[:, None]  # decreasing in the threshold
        low_new = jnp.max(jnp.where(enough, at, low[:, None]), axis=1)
        high_new = jnp.min(jnp.where(enough, high[:, None], at), axis=1)
        exact = n == k[:, None]
        hit = jnp.max(jnp.where(exact, at, -1), axis=1)
        now = exact.any(axis=1) | (high_new - low_new <= 1)
        value = jnp.where(done, value, jnp.where(exact.any(axis=1), hit, low_new))
        stride = jnp.maximum((high_new - low_new) // (WAYS + 1), 1)
        grid = low_new[:, None] + stride[:, None] * jnp.arange(1, WAYS + 1, dtype=jnp.int32)[None]
        return low_new, high_new, jnp.minimum(grid, high_new[:, None]), value, done | now

    zeros = jnp.zeros(m, jnp.int32)
    state = (zeros, zeros + INFINITY, first, zeros, zeros > 0)
    value = lax.while_loop(lambda s: ~s[-1].all(), step, state)[3]
    value = jnp.where(value < NORMAL, 0, value)  # the machine may take subnormal numbers for zero
    return lax.bitcast_convert_type(value, jnp.float32)


def above(x: Float[Array, "m b c"], threshold: Float[Array, "m"]) -> Array:
    """Which elements of a statistic are kept, compared as they were counted.

    Args:
      x: the statistic.
      threshold: of `kth_largest`.

    Returns:
      [M, b, c] bool.
    """
    return x.astype(jnp.float32) >= threshold[:, None, None]


def _sampled(bank: LowRank, statistic: Statistic, k: Array) -> Array:
    """WAYS guesses [M, WAYS], ascending: 4 standard errors of a sample quantile to each side."""
    (_, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    i = jax.random.randint(jax.random.key(1), (SAMPLE,), 0, d_in)
    j = jax.random.randint(jax.random.key(2), (SAMPLE,), 0, d_out)
    d = jnp.einsum("nsr,nrs->ns", bank.u[:, i], bank.v[:, :, j], precision=lax.Precision.HIGHEST)
    x = jnp.sort(statistic(d).astype(jnp.float32), axis=-1)
    share = k.astype(jnp.float32) / jnp.float32(d_in * d_out)
    around = jnp.linspace(-1.0, 1.0, WAYS, dtype=jnp.float32)
    spread = 4.0 * jnp.sqrt(SAMPLE * share * (1.0 - share)) + 1.0
    at = SAMPLE * (1.0 - share)[:, None] + spread[:, None] * around[None]
    at = jnp.clip(at, 0.0, SAMPLE - 1.0).astype(jnp.int32)
    return jnp.take_along_axis(x, at, axis=-1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)

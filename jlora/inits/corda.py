r"""CorDA: an adapter starts from the directions of the weight that the data use most, or least.

=========  =======================================================================
W          the weight of a site, [d_in, d_out]
C          the mean of x x^T over its input rows, [d_in, d_in], damped until it can be inverted
a, b       [d_in, r] and [r, d_out]
s          the adapter's own `scale`
=========  =======================================================================

.. math::
    C W = U \Sigma V^T, \quad a = a_0 = C^{-1} U_I \sqrt{\Sigma_I / s}, \quad
    b = b_0 = \sqrt{\Sigma_I / s} \, V_I^T, \qquad W' = (W - s a_0 b_0) + s a b

I are the first r directions of "ipm" (instruction-previewed: data of the task are what is trained)
or the last r of "kpm" (knowledge-preserved: data of what is to be kept). The damping adds a share
of the mean of the diagonal, 0.01, doubled until ‖C C^-1 - I‖ < 0.05.

Paper: Yang et al. 2024, arXiv:2406.05223.
Source: paper; the damping as PEFT 0.21.
Deviates: a0 and b0 carry what is subtracted; C is the plain mean, where PEFT divides every batch by
the largest of its values: with one batch a and b then differ by a factor, their product does not.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora import numerics
from jlora.analysis.taps import Mask, Moments, input_moments
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.inits.start import Methods, filled, fresh, leading_factors
from jlora.inits.statistics import no_moments, sum_moments
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.wrappers.residual import Residual
from jlora.types import Batch, Dynamic, Tree

MODES = ("ipm", "kpm")
DAMP, CLOSE = 0.01, 0.05  # the first damping; how near to the identity C C^-1 must be


def corda(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    mode: str = "ipm",
    mask: Mask | None = None,
) -> Adapter:
    """An adapter that starts from the directions of the weights that matter to the data.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: read once.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`.
      mode: "ipm" takes what the data use most, "kpm" what they use least.
      mask: batch -> one entry per input row, zero where it is left out (padding).

    Returns:
      Of `Residual(LoRA)` at every site; the function is that of the parameters.

    Raises:
      ValueError: no data, inputs or weights that are not finite, a rank above min(d_in, d_out), an
        unknown mode, and as `jl.init`.
    """
    adapter, batches = fresh(fn, params, batches, methods, Residual)
    moments = input_moments(fn, params, batches, [site for site, _ in adapter.sites], mask)
    return of_adapter(adapter, params, moments, mode)


def of_adapter(
    adapter: Adapter, params: Tree, statistics: Mapping[str, Moments], mode: str = "ipm"
) -> Adapter:
    """An adapter with a, b, a0 and b0 of every site set from its weight and moments of its inputs.

    Args:
      adapter: one adapter of `Residual(LoRA)`.
      params: the weights that it belongs to.
      statistics: path -> moments of its inputs.
      mode: "ipm" or "kpm".

    Returns:
      An adapter of the same sites, shapes, dtypes and scales.

    Raises:
      ValueError: as `corda`.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {MODES}")

    def rule(key: None, w: Dynamic, scale: Dynamic, m: Moments, *, rank: int) -> Arrays:
        c, inverse = damped(m.second / m.count)
        u, s, vt = numerics.svd(numerics.matmul(c, w))
        kept = slice(0, rank) if mode == "ipm" else slice(len(s) - rank, len(s))
        return leading_factors(numerics.matmul(inverse, u[:, kept]), s[kept], vt[kept], scale)

    return filled(adapter, params, rule, name="CorDA", statistics=statistics)


@jax.jit  # else its loop is compiled anew in every call
def damped(c: Float[Array, "d d"]) -> tuple[Array, Array]:
    """A second moment with so much added to its diagonal that it can be inverted, and its inverse.

    Args:
      c: symmetric, not negative.

    Returns:
      Both, [d, d].
    """
    eye, size = jnp.eye(len(c), dtype=c.dtype), jnp.mean(jnp.diag(c))

    def added(damp: Array) -> Array:
        return c + damp * size * eye

    def far(damp: Array) -> Array:
        solution = added(damp)
        return jnp.linalg.norm(numerics.matmul(solution, numerics.inv(solution)) - eye) >= CLOSE

    damp = jax.lax.while_loop(far, lambda d: 2 * d, jnp.asarray(DAMP, c.dtype))
    return added(damp), numerics.inv(added(damp))


SYSTEM = Initialisation(
    name="CorDA",
    paper="Yang 2024, 2406.05223",
    symbol="corda",
    evidence="numpy in float64; the delta of PEFT; inputs of one size in all directions: PiSSA",
    claim="corda",
    method=Residual(LoRA(rank=2)),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params, statistics),
    needs="inputs",
    start=no_moments,
    gather=sum_moments,
    reads_weights=True,
)

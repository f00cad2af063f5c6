r"""LoRA-GA: an adapter starts from the singular directions of the first full gradient.

=========  =======================================================================
G          the gradient of the loss by W, summed over the batches, [d_in, d_out]
u_i, v_i   its singular vectors, the largest first
c          d_out^(1/4) / sqrt(γ), of "stable" size; γ = 16
s          the adapter's own `scale` (the paper trains with `rslora`)
=========  =======================================================================

.. math::
    a = a_0 = c \, [u_1, \ldots, u_r], \quad b = b_0 = c \, [v_{r+1}, \ldots, v_{2r}]^T, \qquad
    W' = (W - s a_0 b_0) + s a b

To first order one step of SGD then moves W by the best approximation of G of rank 2r:

.. math:: \Delta W - \Delta W_0 = - \eta s^2 c^2 \sum_{i \le 2r} \sigma_i u_i v_i^T

Gradients are taken a few sites at a time (`limit`), or layer by layer inside a scan.

Paper: Wang, Yu and Li 2024, arXiv:2407.05000.
Source: official code; its directions "ArB2r" (the default), "A2rBr" and "ArBr".
Deviates: an exact SVD (the code's is randomised). PEFT multiplies b by the singular values, and
scales b alone: its first step is not in proportion to the gradient.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from jlora import numerics
from jlora.analysis.gradients import gradients
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.inits.start import Methods, check_rank, filled, fresh, from_matrices
from jlora.inits.statistics import Gradients, no_gradients, sum_gradients
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.wrappers.residual import Residual
from jlora.types import Batch, Dynamic, Tree

DIRECTIONS: Mapping[str, Callable[[int], tuple[slice, slice]]] = {  # r -> of u, of v
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}


def lora_ga(
    loss: Callable,
    params: Tree,
    batches: Sequence[Batch],
    *,
    methods: Methods,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    limit: int = 2**30,
) -> Adapter:
    """An adapter that starts from the directions of the gradient of a loss.

    Args:
      loss: (params, *batch) -> scalar; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: a sequence; read several times where gradients do not fit in `limit`.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`.
      gamma: γ; a larger one starts nearer to zero.
      direction: which singular vectors a and b take, a name of `DIRECTIONS`.
      limit: bytes of gradients that may exist at once.

    Returns:
      Of `Residual(LoRA)` at every site; the function is that of the parameters.

    Raises:
      ValueError: no batches, gradients that are not finite, a rank above min(d_in, d_out) / 2, an
        unknown direction, and as `jl.init`.
      TypeError: batches that can be read only once.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: got {direction!r}, expected one of {sorted(DIRECTIONS)}")
    adapter, _ = fresh(loss, params, batches, methods, Residual)
    for site, _ in adapter.sites:
        check_rank(site, adapter.trainable[site.path]["a"].shape[-1], "LoRA-GA", times=2)
    parts: dict[str, list[Arrays]] = {site.path: [] for site, _ in adapter.sites}
    for site, _, g in gradients(loss, params, batches, [s for s, _ in adapter.sites], limit):
        rank = adapter.trainable[site.path]["a"].shape[-1]
        parts[site.path].append(directions(g, rank, gamma, direction))
    return from_matrices(adapter, parts)


def directions(g: Dynamic, rank: int, gamma: float, direction: str) -> Arrays:
    """a [d_in, r] and b [r, d_out] of one gradient.

    Args:
      g: the gradient, [d_in, d_out].
      rank: r.
      gamma: γ.
      direction: a name of `DIRECTIONS`.

    Returns:
      Both by name.
    """
    u, _, vt = numerics.svd(g)
    of_u, of_v = DIRECTIONS[direction](rank)
    size = g.shape[1] ** 0.25 / gamma**0.5
    return {"a": size * u[:, of_u], "b": size * vt[of_v]}


def of_adapter(adapter: Adapter, params: Tree, statistics: Gradients) -> Adapter:
    """An adapter with a, b, a0 and b0 of every site set from gradients that are all there.

    Args:
      adapter: one adapter of `Residual(LoRA)`.
      params: the weights that it belongs to, possibly abstract.
      statistics: path -> G [*stack, d_in, d_out].

    Returns:
      An adapter of the same sites, shapes, dtypes and scales.

    Raises:
      ValueError: as `lora_ga`.
    """

    def rule(key: None, w: None, scale: Dynamic, g: Dynamic, *, rank: int) -> Arrays:
        return directions(g.astype(jnp.promote_types(g.dtype, jnp.float32)), rank, 16.0, "ArB2r")

    return filled(adapter, params, rule, name="LoRA-GA", statistics=statistics,
                  reads_weights=False, times=2)  # fmt: skip


SYSTEM = Initialisation(
    name="LoRA-GA",
    paper="Wang 2024, 2407.05000",
    symbol="lora_ga",
    evidence="the first step of SGD is the gradient's best approximation of rank 2r",
    rows=(21,),
    claim="lora_ga",
    method=Residual(LoRA(rank=2)),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params, statistics),
    needs="gradients",
    start=no_gradients,
    gather=sum_gradients,
)

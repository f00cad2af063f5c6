r"""LoRA-SB: LoRA-XS that starts from the first step of full fine-tuning.

=========  =======================================================================
G          the gradient of the loss by W, summed over the batches, [d_in, d_out]
η          the size of that step, the learning rate of full fine-tuning over its warm-up
A, R, B    `a` [d_in, r], `core` [r, r], `b` [r, d_out]; R alone is trained
s          the adapter's own `scale`
=========  =======================================================================

.. math::
    \Delta = -\eta \, \text{sign}(G) = U \Sigma V^T, \qquad
    A = U_r, \quad R = \Sigma_r / s, \quad B = V_r^T, \qquad W' = W + s A R B

sign(G) is the first step of Adam. A and B are orthonormal, so the gradient of R is that of W seen
in these directions, without a preconditioner. Nothing is subtracted: the model starts one step of
rank r away from W, by design.

Paper: Ponkshe et al. 2024, arXiv:2411.19557; the form: Bałazy et al. 2024, arXiv:2405.17604.
Source: paper and official code.
Deviates: an exact SVD (the code's is randomised).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from jlora import numerics
from jlora.analysis.gradients import gradients
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.inits.start import Methods, check_rank, filled, fresh, from_matrices, with_core
from jlora.inits.statistics import Gradients, no_gradients, sum_gradients
from jlora.methods.low_rank.lora_xs import LoRAXS
from jlora.types import Batch, Dynamic, Tree


def lora_sb(
    loss: Callable,
    params: Tree,
    batches: Sequence[Batch],
    *,
    methods: Methods,
    step: float,
    limit: int = 2**30,
) -> Adapter:
    """An adapter of one small trained matrix per site, which starts at a step of full fine-tuning.

    Args:
      loss: (params, *batch) -> scalar; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: a sequence; read several times where gradients do not fit in `limit`.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`: rank and alpha count.
      step: η, above 0; the paper takes learning rate / (warm-up ratio x steps).
      limit: bytes of gradients that may exist at once.

    Returns:
      Of `LoRAXS` at every site; the function is not that of the parameters.

    Raises:
      ValueError: no batches, gradients that are not finite, a rank above min(d_in, d_out), a step
        that is not positive, and as `jl.init`.
      TypeError: batches that can be read only once.
    """
    if not step > 0:
        raise ValueError(f"step: got {step}, expected a positive number")
    plain, _ = fresh(loss, params, batches, methods, lambda method: method)
    adapter = with_core(plain)
    parts: dict[str, list[Arrays]] = {site.path: [] for site, _ in adapter.sites}
    for site, index, g in gradients(loss, params, batches, [s for s, _ in adapter.sites], limit):
        arrays = adapter.frozen[site.path]
        rank, scale = arrays["a"].shape[-1], arrays["scale"].reshape(-1)[index]
        check_rank(site, rank, "LoRA-SB")
        parts[site.path].append(first_step(g, scale, rank, step))
    return from_matrices(adapter, parts)


def first_step(g: Dynamic, scale: Dynamic, rank: int, step: float) -> Arrays:
    """a [d_in, r], core [r, r] and b [r, d_out] of one gradient.

    Args:
      g: the gradient, [d_in, d_out].
      scale: s.
      rank: r.
      step: η.

    Returns:
      The three by name.
    """
    u, s, vt = numerics.svd(-step * jnp.sign(g))
    core = jnp.diag(s[:rank] / scale.astype(s.dtype))
    return {"a": u[:, :rank], "core": core, "b": vt[:rank]}


def of_adapter(adapter: Adapter, params: Tree, statistics: Gradients) -> Adapter:
    """An adapter with a, core and b of every site set from gradients that are all there.

    Args:
      adapter: one adapter of `LoRAXS`.
      params: the weights that it belongs to, possibly abstract.
      statistics: path -> G [*stack, d_in, d_out].

    Returns:
      An adapter of the same sites, shapes, dtypes and scales, of steps of 0.1.

    Raises:
      ValueError: as `lora_sb`.
    """

    def rule(key: None, w: None, scale: Dynamic, g: Dynamic, *, rank: int) -> Arrays:
        return first_step(g, scale, rank, 0.1)

    return filled(adapter, params, rule, name="LoRA-SB", statistics=statistics,
                  reads_weights=False)  # fmt: skip


SYSTEM = Initialisation(
    name="LoRA-SB",
    paper="Ponkshe 2024, 2411.19557",
    symbol="lora_sb",
    evidence="the best approximation of rank r of Adam's first step; its error is the tail's",
    rows=(22,),
    claim="lora_sb",
    method=LoRAXS(rank=2),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params, statistics),
    needs="gradients",
    start=no_gradients,
    gather=sum_gradients,
    breaks={"identity": "it starts one step of full fine-tuning away from the base"},
)

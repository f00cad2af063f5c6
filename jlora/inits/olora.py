r"""OLoRA: an adapter starts from the first orthonormal directions of the weight.

=========  =======================================================================
W          the weight of a site, [d_in, d_out]
a, b       [d_in, r] and [r, d_out]; b has orthonormal rows
s          the adapter's own `scale`
=========  =======================================================================

.. math::
    W^T = Q R, \quad a = a_0 = (R_{:r})^T, \quad b = b_0 = (Q_{:, :r})^T, \qquad
    W' = (W - s a_0 b_0) + s a b

Paper: Büyükakyüz 2024, arXiv:2406.01775.
Source: paper.
Deviates: a0 and b0 carry what is subtracted; the weights are not edited.
"""

from collections.abc import Callable, Iterable

from jax import Array
from jaxtyping import Float

from jlora import numerics
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.inits.start import Methods, filled, fresh
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.wrappers.residual import Residual
from jlora.types import Batch, Dynamic, Tree


def olora(
    fn: Callable, params: Tree, batches: Iterable[Batch], *, methods: Methods
) -> Adapter:  # fmt: skip
    """An adapter that starts from the QR factors of the weights.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: of which the first one shows the shapes.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`.

    Returns:
      Of `Residual(LoRA)` at every site; the function is that of the parameters.

    Raises:
      ValueError: an abstract weight or one that is not finite, a rank above min(d_in, d_out), and
        as `jl.init`.
    """
    adapter, _ = fresh(fn, params, batches, methods, Residual)
    return of_adapter(adapter, params)


def of_adapter(adapter: Adapter, params: Tree) -> Adapter:
    """An adapter with a, b, a0 and b0 of every site set from the QR factors of its weight.

    Args:
      adapter: one adapter of `Residual(LoRA)`.
      params: the weights that it belongs to.

    Returns:
      An adapter of the same sites, shapes, dtypes and scales.

    Raises:
      ValueError: as `olora`.
    """

    def rule(key: None, w: Dynamic, scale: Dynamic, _: None, *, rank: int) -> Arrays:
        a, b = orthonormal(w, rank)
        return {"a": a, "b": b}

    return filled(adapter, params, rule, name="OLoRA")


def orthonormal(w: Float[Array, "d_in d_out"], rank: int) -> tuple[Array, Array]:
    """The first rows of R and columns of Q, of the transposed weight.

    Args:
      w: the weight.
      rank: how many.

    Returns:
      a [d_in, r], b [r, d_out].
    """
    q, r = numerics.qr(w.T)
    return r[:rank].T, q[:, :rank].T


SYSTEM = Initialisation(
    name="OLoRA",
    paper="Büyükakyüz 2024, 2406.01775",
    symbol="olora",
    evidence="numpy's QR in float64; PEFT's start and base",
    claim="olora",
    method=Residual(LoRA(rank=2)),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params),
    reads_weights=True,
)

r"""NLoRA: an adapter with a square matrix in its middle starts from rows and columns of the weight.

=========  =======================================================================
W          the weight of a site, [d_in, d_out]
A, N, B    `a` [d_in, r], `core` [r, r], `b` [r, d_out]
s          the adapter's own `scale`
=========  =======================================================================

.. math::
    A = W_{:, :r}, \quad B = W_{:r, :}, \quad N = W_{:r, :r} \ \text{or} \ (W_{:r, :r})^+, \qquad
    W' = (W - s A_0 N_0 B_0) + s A N B

With the pseudo-inverse ("pinv") A N B is Nyström's approximation, exact for a weight of rank r. No
factorisation is needed. `slora` starts at random with B = 0; `int_tune` trains N alone.

Paper: Guo et al. 2025, arXiv:2502.14482.
Source: official code, which has the raw block as N and subtracts nothing: `residual=False`.
Deviates: by default the start is subtracted, so that the function is that of the parameters.
"""

from collections.abc import Callable, Iterable

from jaxtyping import PRNGKeyArray

from jlora import numerics
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Arrays
from jlora.inits.start import Methods, filled, fresh, with_core
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.low_rank.slora import SLoRA
from jlora.methods.wrappers.residual import Residual
from jlora.types import Batch, Dynamic, Tree

MIDDLES = ("raw", "pinv")


def slora(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    key: PRNGKeyArray,
) -> Adapter:
    """An adapter with a square matrix in its middle that starts at random, B = 0.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters, possibly abstract.
      batches: of which the first one shows the shapes.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`: rank and alpha count.
      key: of the draws, folded per site.

    Returns:
      Of `SLoRA` at every site.

    Raises:
      ValueError: as `jl.init`.
    """
    return fresh(fn, params, batches, methods, _slora, key)[0]


def nlora(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    middle: str = "raw",
    residual: bool = True,
) -> Adapter:
    """An adapter that starts from the first rows and columns of the weights.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: of which the first one shows the shapes.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`: rank and alpha count.
      middle: "raw" or "pinv".
      residual: subtract the start from the weight.

    Returns:
      Of `SLoRA` at every site, in a `Residual` where the start is subtracted.

    Raises:
      ValueError: an abstract weight or one that is not finite, a rank above min(d_in, d_out), an
        unknown middle, and as `jl.init`.
    """

    def change(method: LoRA) -> Method:
        return Residual(_slora(method)) if residual else _slora(method)

    adapter, _ = fresh(fn, params, batches, methods, change)
    return of_adapter(adapter, params, middle)


def int_tune(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    middle: str = "raw",
    residual: bool = True,
) -> Adapter:
    """An adapter as of `nlora` of which the square matrix alone is trained, r^2 numbers per site.

    Args and Raises are those of `nlora`.

    Returns:
      Of `LoRAXS` at every site, in a `Residual` where the start is subtracted.
    """
    plain, _ = fresh(fn, params, batches, methods, lambda method: method)
    adapter = with_core(plain, Residual if residual else lambda method: method)
    return of_adapter(adapter, params, middle)


def of_adapter(adapter: Adapter, params: Tree, middle: str = "raw") -> Adapter:
    """An adapter with a, core and b of every site, and their copies, set from its weight.

    Args:
      adapter: one adapter of `SLoRA` or `LoRAXS`, possibly in a `Residual`.
      params: the weights that it belongs to.
      middle: "raw" or "pinv".

    Returns:
      An adapter of the same sites, shapes, dtypes and scales.

    Raises:
      ValueError: as `nlora`.
    """
    if middle not in MIDDLES:
        raise ValueError(f"middle: got {middle!r}, expected one of {MIDDLES}")

    def rule(key: None, w: Dynamic, scale: Dynamic, _: None, *, rank: int) -> Arrays:
        block = w[:rank, :rank]
        core = block if middle == "raw" else numerics.pinv(block)
        return {"a": w[:, :rank], "core": core, "b": w[:rank]}

    return filled(adapter, params, rule, name="NLoRA")


def _slora(method: LoRA) -> SLoRA:
    return SLoRA(rank=method.rank, alpha=method.alpha)


SYSTEM = Initialisation(
    name="NLoRA",
    paper="Guo 2025, 2502.14482",
    symbol="nlora",
    evidence="rows and columns of the weight; exact for a weight of rank r with the pseudo-inverse",
    rows=(24,),
    claim="nlora",
    method=Residual(SLoRA(rank=2)),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params),
    reads_weights=True,
)

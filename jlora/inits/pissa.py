r"""PiSSA as an initialisation: an adapter starts from the principal part of the weights.

=========  =======================================================================
W          the weight of a site, [d_in, d_out]
a, b       the trained factors, [d_in, r] and [r, d_out]
a0, b0     their frozen copies: what is subtracted, so that W' is W at the start
s          the adapter's own `scale`, which stays what it is
=========  =======================================================================

.. math::
    W = U \Sigma V^T, \quad a = a_0 = U_r \sqrt{\Sigma_r / s}, \quad
    b = b_0 = \sqrt{\Sigma_r / s} \, V_r^T, \qquad W' = (W - s a_0 b_0) + s a b

`jl.init` with the method `PiSSA` starts there already. `of_adapter` sets an adapter anew from other
values of the weights: those that are loaded after the adapter was made, or that it was merged into
(the next round of training then starts from the principal part of what the last one has learned).

Paper: Meng, Wang and Zhang 2024, arXiv:2404.02948.
Source: paper, by the functions of `jlora.methods.low_rank.pissa`.
Deviates: a0 and b0 carry the residual; the weights are not edited.
"""

from collections.abc import Callable, Iterable

from jaxtyping import PRNGKeyArray

from jlora.contracts.initialisation import Initialisation, Params
from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.inits.start import Methods, filled, fresh
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.low_rank.pissa import PiSSA, principal
from jlora.methods.wrappers.residual import Residual
from jlora.types import Batch, Dynamic, Tree


def pissa(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    niter: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Adapter:
    """An adapter that starts from the principal part of the weights.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: of which the first one shows the shapes.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`.
      niter: power iterations of a randomised SVD; None takes the exact one.
      key: of the randomised SVD; needed with `niter`.

    Returns:
      Of `Residual(LoRA)` at every site; the function is that of the parameters.

    Raises:
      ValueError: `niter` without a key, an abstract weight or one that is not finite, a rank above
        min(d_in, d_out), and as `jl.init`.
    """
    if niter is not None and key is None:
        raise ValueError("key: got None, expected one: a randomised SVD draws")
    adapter, _ = fresh(fn, params, batches, methods, Residual)
    return of_adapter(key, adapter, params, niter)


def of_adapter(
    key: PRNGKeyArray | None, adapter: Adapter, params: Params, niter: int | None = None
) -> Adapter:
    """An adapter with a, b, a0 and b0 of every site set from the principal part of its weight.

    Args:
      key: of the randomised SVD, folded per site; not used without `niter`.
      adapter: one adapter, all of whose sites are of the method `PiSSA` or `Residual(LoRA)`.
      params: the weights that it belongs to; they are read and left alone.
      niter: power iterations of a randomised SVD; None takes the exact one.

    Returns:
      An adapter of the same sites, shapes, dtypes and scales, merged with which each weight is
      what it was. With the same key and `niter` it is the adapter that `jl.init` makes.

    Raises:
      ValueError: a bank, a site of another method or that is not in `params`, an abstract weight, a
        rank above min(d_in, d_out), a and a0 (b and b0) of different dtypes.
    """
    for site, method in adapter.sites:
        inner = method.method if isinstance(method, Residual) else method
        if type(method) is not PiSSA and (inner is method or type(inner) is not LoRA):
            raise ValueError(f"{site.path}: got the method {method}, expected PiSSA")
        own, _ = adapter.arrays(site)
        for name in ("a", "b"):
            got, expected = own[f"{name}0"].dtype, own[name].dtype
            if got != expected:
                got = f"got {got}, expected {expected} as {name} has"
                raise ValueError(f"{site.path}/{name}0: {got}")

    def rule(key: Dynamic, w: Dynamic, scale: Dynamic, _: None, *, rank: int) -> Arrays:
        a, b = principal(key, w, rank, scale, niter)
        return {"a": a, "b": b}

    return filled(adapter, params, rule, name="PiSSA", key=key)


SYSTEM = Initialisation(
    name="PiSSA initialisation",
    paper="Meng 2024, 2404.02948",
    symbol="pissa",
    evidence="numpy's SVD in float64; bitwise the adapter of jl.init; PEFT's delta",
    kind="component",
    method=PiSSA(rank=2),
    initialise=lambda key, adapter, params, statistics: of_adapter(key, adapter, params),
    reads_weights=True,
)

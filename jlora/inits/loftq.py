r"""LoftQ: a quantised base and the adapter that makes up for it, found in turns.

=========  =======================================================================
W          the weight of a site
Q          its quantised form (`jl.quantize`), which is what the model keeps
a, b       [d_in, r] and [r, d_out]
s          the adapter's own `scale`
=========  =======================================================================

.. math::
    Q_t = q(W - s a_{t-1} b_{t-1}), \qquad
    W - Q_t = U \Sigma V^T, \quad a_t = U_r \sqrt{\Sigma_r / s}, \quad
    b_t = \sqrt{\Sigma_r / s} \, V_r^T

from a_0 = b_0 = 0. The model starts at Q + s a b, nearer to W than Q is.

Paper: Li et al. 2023, arXiv:2310.08659.
Source: paper, algorithm 1.
Deviates: quantised by `jl.quantize` (uniform levels), where the paper has NF4.
"""

from collections.abc import Callable, Iterable

import jax
from jaxtyping import Array

from jlora import numerics
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lift import check, flatten, is_array
from jlora.core.site import Arrays, Site, fold, unfold
from jlora.inits.start import (
    Methods,
    check_rank,
    fresh,
    from_factors,
    leading_factors,
    matrices,
)
from jlora.methods.low_rank.lora import LoRA
from jlora.quantized import Quantized, quantize
from jlora.types import Batch, Dynamic, Tree


def loftq(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    bits: int = 4,
    block: int = 64,
    iterations: int = 1,
) -> tuple[Tree, Adapter]:
    """A quantised base, and an adapter that starts at what quantising it has lost.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters; they are read and left alone.
      batches: of which the first one shows the shapes.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`.
      bits: 8 or 4, of `jl.quantize`.
      block: of `jl.quantize`.
      iterations: turns, at least 1.

    Returns:
      The parameters with quantised leaves at the sites, and the adapter that belongs to them.

    Raises:
      ValueError: an abstract weight or one that is not finite, a rank above min(d_in, d_out), no
        iterations, and as `jl.init` and `jl.quantize`.
    """
    adapter, _ = fresh(fn, params, batches, methods, lambda method: method)
    return of_adapter(adapter, params, bits, block, iterations)


def of_adapter(
    adapter: Adapter, params: Tree, bits: int, block: int, iterations: int
) -> tuple[Tree, Adapter]:
    """The same for an adapter that exists.

    Args:
      adapter: one adapter of LoRA.
      params: the weights that it belongs to.
      bits: 8 or 4.
      block: of `jl.quantize`.
      iterations: turns, at least 1.

    Returns:
      (parameters, adapter), as `loftq`.

    Raises:
      ValueError: as `loftq`.
    """
    one_adapter(adapter, "LoftQ")
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, expected at least 1")
    leaves, tree = flatten(params)
    check({path: w for path, w in leaves.items() if is_array(w)}, adapter)
    new = dict(leaves)

    def factors(site: Site) -> tuple[Array, Array]:
        p = adapter.arrays(site)[0]
        rank = p["a"].shape[-1]
        check_rank(site, rank, "LoftQ")
        w = matrices(site, leaves[site.path])
        new[site.path], a, b = _site(site, w, p["scale"], rank, bits, block, iterations)
        return a, b

    started = from_factors(adapter, factors)
    return jax.tree.unflatten(tree, list(new.values())), started


def _site(
    site: Site, w: Array, scale: Array, rank: int, bits: int, block: int, iterations: int
) -> tuple[Quantized, Array, Array]:
    """(quantised leaf, a, b) of one site."""

    def one(rest: Array, scale: Dynamic) -> Arrays:
        u, s, vt = numerics.svd(rest)
        return leading_factors(u[:, :rank], s[:rank], vt[:rank], scale.astype(s.dtype))

    for _ in site.stack:
        one = jax.vmap(one)
    left = w
    for turn in range(iterations):
        q = quantize(unfold(left, site.kinds, site.shape).astype(site.dtype), bits, block)
        factors = one(w - fold(q.dequantize(), site.kinds).astype(w.dtype), scale)
        if turn + 1 < iterations:
            product = numerics.matmul(factors["a"], factors["b"])
            left = w - scale.reshape(*site.stack, 1, 1).astype(w.dtype) * product
    return q, factors["a"], factors["b"]


SYSTEM = Initialisation(
    name="LoftQ",
    paper="Li 2023, 2310.08659",
    symbol="loftq",
    evidence="nearer to the weight than the quantised base; exact at full rank",
    claim="loftq",
    method=LoRA(rank=2),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params, 4, 6, 1)[1],
    reads_weights=True,
    breaks={"identity": "its adapter belongs to the quantised base, not to the given one"},
)

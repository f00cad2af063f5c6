r"""EVA: an adapter starts from the directions in which the inputs of its sites vary most.

=========  =======================================================================
X          all input rows of a site, [n, d_in]; σ_i, v_i its singular values and right vectors
a, b       [d_in, r] and [r, d_out]
ε_i        σ_i^2 / Σ_j σ_j^2, the explained variance of a direction
r_l        rank of a matrix l; r the configured one, ρ r at most
=========  =======================================================================

.. math::
    a = [v_1, \ldots, v_{r_l}], \quad b = 0, \qquad
    \{r_l\} : \text{the } \sum_l r \text{ largest } \epsilon_{l, i} \text{ of all matrices}

so the budget of ranks is given to the matrices whose inputs have the most to explain; one that
gets none has no adapter. α grows with the rank, so the scale stays α / r. In a stack of layers the
ranks differ by zero columns of a, which never train.

The sums of x x^T are exact (`svd="moments"`, d_in^2 numbers per site), or the SVD is incremental
(`svd="incremental"`, ρ r d_in numbers).

Paper: Paischer et al. 2024, arXiv:2410.07170.
Source: paper; PEFT 0.21 for ρ, whitening and the scale.
Deviates: all batches are read, where the paper stops at convergence; each site has sums of its own,
where PEFT looks for equal inputs. PEFT subtracts the mean of the rows, here `center` does.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora import numerics
from jlora.analysis.taps import Leading, Mask, Moments, input_moments, input_svd
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.inits.start import Methods, check_rank, filled, fresh
from jlora.inits.statistics import no_moments, sum_moments
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Batch, Dynamic, Tree


def eva(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    *,
    methods: Methods,
    rho: float = 2.0,
    mask: Mask | None = None,
    center: bool = False,
    whiten: bool = False,
    svd: str = "moments",
    adjust_scale: bool = True,
) -> Adapter:
    """An adapter of LoRA that starts from the leading directions of the inputs.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters; they are left alone.
      batches: read once.
      methods: {regex on paths, or "all-linear": LoRA}, as of `jl.init`.
      rho: ρ, at least 1: a matrix gets at most ρ r directions; 1 keeps every rank as it is.
      mask: batch -> one entry per input row, zero where it is left out (padding).
      center: of the rows minus their mean; only with moments.
      whiten: divide the directions by the root of their singular values.
      svd: "moments" or "incremental".
      adjust_scale: α grows in proportion to the rank.

    Returns:
      Of LoRA; the function is that of the parameters.

    Raises:
      ValueError: no data, fewer input rows than directions, inputs that are not finite, a rank
        above min(d_in, d_out), an unknown `svd`, and as `jl.init`.
    """
    if svd not in ("moments", "incremental") or (center and svd == "incremental"):
        raise ValueError(f"svd: got {svd!r} with {center=}, expected 'moments' or 'incremental'")
    if rho < 1:
        raise ValueError(f"rho: got {rho}, expected at least 1")
    adapter, batches = fresh(fn, params, batches, methods, lambda method: method)
    rows = [site for site, _ in adapter.sites]
    for site, method in adapter.sites:
        check_rank(site, _rank(method), "EVA")
    if svd == "moments":
        moments = input_moments(fn, params, batches, rows, mask)
        leading = {path: of_moments(m, center) for path, m in moments.items()}
    else:
        most = max(round(rho * _rank(method)) for _, method in adapter.sites)
        leading = input_svd(fn, params, batches, rows, most, mask)
    return _built(adapter, leading, ranks(adapter, leading, rho), whiten, adjust_scale)


def of_moments(moments: Moments, center: bool = False) -> Leading:
    """All directions of the inputs, from their sums.

    Args:
      moments: of one site.
      center: of the rows minus their mean.

    Returns:
      The same form as `input_svd` gives, of rank d_in.
    """
    second, (first, count) = moments.second, moments[1:]
    if center:
        mean = first / count[..., None]
        second = second - first[..., :, None] * mean[..., None, :]
    values, vectors = numerics.eigh(second)
    values, vectors = jnp.flip(values, -1), jnp.flip(vectors, -1)
    values = jnp.maximum(values, jnp.zeros((), values.dtype))
    return Leading(vectors.mT, jnp.sqrt(values), jnp.sum(values, -1), count)


def ranks(adapter: Adapter, leading: Mapping[str, Leading], rho: float) -> dict[str, np.ndarray]:
    """The rank of every matrix, by explained variance under one budget.

    Args:
      adapter: of LoRA with the configured ranks.
      leading: path -> the directions of its inputs.
      rho: ρ.

    Returns:
      path -> ranks [*stack]; their sum is that of the configured ones.

    Raises:
      ValueError: fewer input rows than directions.
    """
    shares, owners, budget = [], [], 0
    for site, method in adapter.sites:
        r, lead = _rank(method), leading[site.path]
        few = int(np.min(np.asarray(lead.count)))
        if few < r:
            raise ValueError(f"{site.path}: got {few} input rows, expected at least the rank {r}")
        most = min(round(rho * r), site.d_in, site.d_out, few)
        share = np.square(np.asarray(lead.values, np.float64)) / np.asarray(lead.energy)[..., None]
        share = share.reshape(-1, share.shape[-1])[:, :most]
        budget += r * len(share)
        for index in range(len(share)):
            shares.append(share[index])
            owners += [(site.path, index)] * len(share[index])
    best = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    given = {s.path: np.zeros(math.prod(s.stack), int) for s, _ in adapter.sites}
    for k in best:
        path, index = owners[k]
        given[path][index] += 1
    return {s.path: given[s.path].reshape(s.stack) for s, _ in adapter.sites}


def _built(
    adapter: Adapter,
    leading: Mapping[str, Leading],
    given: Mapping[str, np.ndarray],
    whiten: bool,
    adjust_scale: bool,
) -> Adapter:
    """LoRA of the given ranks; sites without any are left out."""
    trainable, frozen, rows = {}, {}, []
    for site, method in adapter.sites:
        top, own = int(given[site.path].max()), adapter.trainable[site.path]
        if top == 0:
            continue
        assert isinstance(method, LoRA)
        live = np.arange(top) < given[site.path][..., None]
        a = jnp.where(live[..., None, :], directions(leading[site.path], top, whiten), 0.0)
        grown = given[site.path] / method.rank if adjust_scale else np.ones(site.stack)
        each = np.maximum(given[site.path], 1)
        scale = method.alpha * grown / (np.sqrt(each) if method.rslora else each)
        trainable[site.path] = {
            "a": a.astype(own["a"].dtype),
            "b": jnp.zeros((*site.stack, top, site.d_out), own["b"].dtype),
        }
        frozen[site.path] = {"scale": jnp.asarray(scale, jnp.float32)}
        alpha = method.alpha * (top / method.rank if adjust_scale else 1.0)
        rows.append((site, dataclasses.replace(method, rank=top, alpha=alpha)))
    return Adapter(trainable, frozen, tuple(rows))


def directions(leading: Leading, rank: int, whiten: bool = False) -> Array:
    """The first directions as columns.

    Args:
      leading: directions of one site.
      rank: how many.
      whiten: divide by the root of the singular values.

    Returns:
      a [*stack, d_in, rank].
    """
    a = leading.vectors[..., :rank, :].mT
    return a / jnp.sqrt(leading.values[..., None, :rank]) if whiten else a


def of_adapter(adapter: Adapter, params: Tree, statistics: Mapping[str, Moments]) -> Adapter:
    """An adapter of LoRA with a set from moments of the inputs, all ranks as they are.

    Args:
      adapter: one adapter of LoRA with b = 0.
      params: the weights that it belongs to, possibly abstract.
      statistics: path -> moments of its inputs.

    Returns:
      An adapter of the same sites, shapes, dtypes and scales.

    Raises:
      ValueError: a bank, a rank above min(d_in, d_out).
    """

    def rule(key: None, w: None, scale: Dynamic, m: Moments, *, rank: int) -> Arrays:
        return {"a": directions(of_moments(m), rank)}

    return filled(adapter, params, rule, name="EVA", statistics=statistics, reads_weights=False)


def _rank(method: Dynamic) -> int:
    return method.rank


SYSTEM = Initialisation(
    name="EVA",
    paper="Paischer 2024, 2410.07170",
    symbol="eva",
    evidence="the subspace and the ranks of numpy's SVD of all inputs, and of PEFT",
    rows=(23,),
    claim="eva",
    method=LoRA(rank=2),
    initialise=lambda key, adapter, params, statistics: of_adapter(adapter, params, statistics),
    needs="inputs",
    start=no_moments,
    gather=sum_moments,
)

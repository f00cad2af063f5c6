r"""PiSSA as an initialisation: an existing adapter starts from the principal part of the weights.

=========  =======================================================================
W          the weight of a site, [d_in, d_out]
a, b       the trained factors, [d_in, r] and [r, d_out]
a0, b0     their frozen copies: what is subtracted, so that W' is W at the start
s          the adapter's own `scale`, which stays what it is
=========  =======================================================================

.. math::
    W = U \Sigma V^T, \quad a = a_0 = U_r \sqrt{\Sigma_r / s}, \quad
    b = b_0 = \sqrt{\Sigma_r / s} \, V_r^T, \qquad W' = (W - s a_0 b_0) + s a b

`jl.init` with the method `PiSSA` starts there already. This sets an adapter anew from other values
of the weights: those that are loaded after the adapter was made, or that it was merged into (the
next round of training then starts from the principal part of what the last one has learned).

Paper: Meng, Wang and Zhang 2024, arXiv:2404.02948.
Source: paper, by the functions of `jlora.methods.low_rank.pissa`.
Deviates: a0 and b0 carry the residual; the weights are not edited.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.contracts.initialisation import Initialisation, Params
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.init import key_of
from jlora.core.lift import check, flatten, is_array
from jlora.core.site import Arrays, Site, fold
from jlora.methods.low_rank.pissa import PiSSA, principal


def pissa(key: PRNGKeyArray, adapter: Adapter, params: Params, niter: int | None = None) -> Adapter:
    """The adapter with a, b, a0 and b0 of every site set from the principal part of its weight.

    Args:
      key: of the randomised SVD, folded per site; not used without `niter`.
      adapter: one adapter, all of whose sites are of the method `PiSSA`.
      params: the weights that it belongs to; they are read and left alone.
      niter: power iterations of a randomised SVD; None takes the exact one.

    Returns:
      An adapter of the same sites, shapes, dtypes and scales, merged with which each weight is
      what it was. With the same key and `niter` it is the adapter that `jl.init` makes.

    Raises:
      ValueError: a bank, a site of another method or that is not in `params`, an abstract weight, a
        rank above min(d_in, d_out), a and a0 (b and b0) of different dtypes.
    """
    one_adapter(adapter, "pissa")
    leaves, _ = flatten(params)
    check({path: w for path, w in leaves.items() if is_array(w)}, adapter)
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for site, method in adapter.sites:
        if type(method) is not PiSSA:
            raise ValueError(f"{site.path}: got the method {method}, expected PiSSA")
        w = leaves[site.path]
        w = w.dequantize() if hasattr(w, "dequantize") else w
        if isinstance(w, jax.ShapeDtypeStruct):
            raise ValueError(f"{site.path}: got an abstract weight, expected one with values")
        new = _factors(key_of(key, site.path), site, w, adapter, niter)
        trainable[site.path] = {**trainable[site.path], "a": new["a"], "b": new["b"]}
        frozen[site.path] = {**frozen[site.path], "a0": new["a"], "b0": new["b"]}
    return adapter.replace(trainable=trainable, frozen=frozen)


def _factors(
    key: jax.Array, site: Site, w: jax.Array, adapter: Adapter, niter: int | None
) -> Arrays:
    """a [*stack, d_in, r] and b [*stack, r, d_out] of one site, in the dtypes of the adapter."""
    own, _ = adapter.arrays(site)
    for name in ("a", "b"):
        got, expected = own[f"{name}0"].dtype, own[name].dtype
        if got != expected:
            raise ValueError(f"{site.path}/{name}0: got {got}, expected {expected} as {name} has")
    rank, limit = own["a"].shape[-1], min(site.d_in, site.d_out)
    if rank > limit:
        raise ValueError(f"{site.path}: PiSSA rank expected in 1..{limit}, got {rank}")

    def one(key: jax.Array, w: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        return principal(key, w, rank, scale, niter)

    m, scale = fold(w, site.kinds).astype(site.param_dtype), own["scale"].astype(site.param_dtype)
    if site.stack:
        count = math.prod(site.stack)
        keys = jax.random.split(key, count)
        a, b = jax.vmap(one)(keys, m.reshape(count, *m.shape[-2:]), scale.reshape(count))
    else:
        a, b = one(key, m, scale)
    made = {"a": a, "b": b}
    return {k: jnp.reshape(t, own[k].shape).astype(own[k].dtype) for k, t in made.items()}


SYSTEM = Initialisation(
    name="PiSSA initialisation",
    paper="Meng 2024, 2404.02948",
    symbol="pissa",
    evidence="numpy's SVD in float64; bitwise the adapter of jl.init",
    kind="component",
    method=PiSSA(rank=2),
    initialise=lambda key, adapter, params, statistics: pissa(key, adapter, params),
    reads_weights=True,
)

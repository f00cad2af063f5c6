r"""Reducing intruder dimensions: their singular values scaled down, so that less is forgotten.

===============  ============================================================================
W, dW            a base matrix [d_in, d_out] and what an adapter adds to it
u_j, s_j, v_j    leading singular directions of W' = W + dW
J                those that are intruders (`jlora.analysis.intruders`)
lambda           the factor that stays: 1 changes nothing, 0 takes them out
r                rank of the adapter
===============  ============================================================================

.. math::
    W'_\lambda = W' + (\lambda - 1) \sum_{j \in J} s_j u_j v_j^T, \qquad
    dW_\lambda = \mathrm{SVD}_r(W'_\lambda - W)

`scaled` is the first line for any fine-tuned weight; `reduced` is both for an adapter, whose rank
and sites stay. What the rank cuts off is reported. `chosen` scales other directions of the same
matrix, which is what a control needs.

Reference: Shuttleworth et al. 2024, arXiv:2410.21228 (scaling intruders of fine-tuned models).
Deviates: lambda is the factor that stays, as in the equation of PEFT's function, whose text says
the opposite; the default is that of the equation, 0.75.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora import numerics
from jlora.analysis.intruders import Intruders, Side, intruders, survey
from jlora.core.adapter import Adapter
from jlora.core.merge import delta, merge
from jlora.core.method import rank_of
from jlora.core.site import at_least_float32
from jlora.system import System
from jlora.types import Dynamic, Tree


class Reduced(NamedTuple):
    """An adapter with weaker intruders."""

    adapter: Adapter  # of the same sites and ranks
    seen: dict[str, Intruders]  # of the adapter as it was, by path
    cut: dict[str, Float[Array, "*stack"]]  # Frobenius norm of what the rank cut off, by path


def chosen(
    after: Float[Array, "*stack d_in d_out"],
    seen: Intruders,
    flags: Bool[Array, "*stack k"],
    factor: float,
) -> Float[Array, "*stack d_in d_out"]:
    """A matrix with the singular values of some leading directions scaled.

    Args:
      after: W'.
      seen: its leading directions.
      flags: which of them are scaled.
      factor: lambda.

    Returns:
      W'_lambda, in at least float32.
    """
    s = jnp.where(flags, seen.s, jnp.zeros_like(seen.s)) * jnp.asarray(factor - 1.0, seen.s.dtype)
    change = numerics.einsum("...ij,...j,...jo->...io", seen.u, s, seen.v)
    return after.astype(at_least_float32(after.dtype)) + change


def scaled(
    before: Float[Array, "*stack d_in d_out"],
    after: Float[Array, "*stack d_in d_out"],
    factor: float = 0.75,
    top: int = 10,
    epsilon: float = 0.5,
    side: Side = "out",
) -> Float[Array, "*stack d_in d_out"]:
    """A fine-tuned matrix with its intruders scaled.

    Args:
      before: W.
      after: W'.
      factor: lambda in [0, 1]; 0.75 as in PEFT.
      top: k, as of `jlora.analysis.intruders.intruders`.
      epsilon: threshold, likewise.
      side: likewise.

    Returns:
      W'_lambda, in at least float32.

    Raises:
      ValueError: a factor outside of [0, 1].
    """
    _check(factor)
    seen = intruders(before, after, top, epsilon, side)
    return chosen(after, seen, seen.flags, factor)


def reduced(
    params: Tree,
    adapter: Adapter,
    factor: float = 0.75,
    top: int = 10,
    epsilon: float = 0.5,
    side: Side = "out",
) -> Reduced:
    """An adapter with its intruders scaled, of the same rank.

    Args:
      params: of the base.
      adapter: of methods that can be given factors, such as LoRA.
      factor: lambda in [0, 1]; 0.75 as in PEFT. With 1 the delta stays as it is.
      top: k, as of `jlora.analysis.intruders.intruders`.
      epsilon: threshold, likewise.
      side: likewise.

    Returns:
      The adapter, the intruders that it had, and what its rank cut off. The scale of a site becomes
      1: both factors hold the root of the singular values.

    Raises:
      ValueError: a factor outside of [0, 1], a method that takes no factors.
    """
    _check(factor)
    sites = [site for site, _ in adapter.sites]
    seen = survey(params, merge(params, adapter), sites, top, epsilon, side)
    changes = delta(params, adapter)
    trainable, frozen, rows, cut = {}, {}, [], {}
    for site, method in adapter.sites:
        x = seen[site.path]
        want = chosen(changes[site.path], x, x.flags, factor)
        rank = rank_of(method)
        u, s, v = numerics.svd(want)
        root = jnp.sqrt(s[..., :rank])
        left, right = u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]
        own = method.of_factors(left, right)
        names = {**adapter.trainable[site.path], **adapter.frozen[site.path]}
        if own is None or own.keys() != names.keys():
            raise ValueError(f"{site.path}: got {method}, expected a method of given factors, LoRA")
        cut[site.path] = jnp.sqrt(jnp.sum(s[..., rank:] ** 2, axis=-1))
        full = {n: jnp.broadcast_to(own[n], t.shape).astype(t.dtype) for n, t in names.items()}
        trainable[site.path] = {n: full[n] for n in adapter.trainable[site.path]}
        frozen[site.path] = {n: full[n] for n in adapter.frozen[site.path]}
        rows.append((site, _unit(method, rank)))
    return Reduced(Adapter(trainable, frozen, tuple(rows)), seen, cut)


def _unit(method: Dynamic, rank: int) -> Dynamic:
    """The method with the alpha of scale 1."""
    if not hasattr(method, "alpha"):
        return method
    root = getattr(method, "rslora", False)
    return dataclasses.replace(method, alpha=float(rank) ** (0.5 if root else 1.0))


def _check(factor: float) -> None:
    if not 0 <= factor <= 1:
        raise ValueError(f"factor: got {factor}, expected in [0, 1]")


SYSTEM = System(
    name="Intruder reduction",
    paper="Shuttleworth 2024, 2410.21228",
    symbol="reduced",
    kind="analysis",
    evidence="the equation by numpy; 1 changes nothing, 0 takes a planted direction out",
    rows=(44,),
    claim="intruder_reduction",
)

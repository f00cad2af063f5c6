r"""Intruder dimensions: singular vectors of a fine-tuned weight that the base does not have.

=============  ==============================================================================
W, W'          a matrix before and after fine-tuning, [d_in, d_out]
v_i, v'_j      their singular vectors in the output space, of the largest singular value first;
               in the input space with ``side="in"``
k, epsilon     how many leading vectors of W' are looked at, and the threshold of a cosine
c_j            the largest cosine of v'_j with any singular vector of W, signs ignored
=============  ==============================================================================

.. math::
    c_j = \max_i |\langle v_i, v'_j \rangle|, \qquad
    \mathrm{intruders}_\epsilon(W, W') = |\{ j \le k : c_j < \epsilon \}|

A vector that turned a little keeps a large cosine with the one it was; a strong direction that the
base lacks pushes itself among the leading ones and is far from all of them. Weights are data here,
so full fine-tuning, LoRA and a merged checkpoint are counted alike: `survey` takes parameters
before and after. One SVD in at least float32 per matrix, outside of training.

Reference: Shuttleworth et al. 2024, arXiv:2410.21228 (algorithm 1; epsilon 0.5, k 10).
Deviates: the thin SVD. Singular vectors of the value zero are an arbitrary basis of a null space,
so they count as none of W; the full one that PEFT takes has them where d_out > d_in.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora import numerics
from jlora.core.lift import flatten
from jlora.core.site import Site, at_least_float32, fold
from jlora.system import System
from jlora.types import Dynamic, Tree

Side = Literal["out", "in"]


class Basis(NamedTuple):
    """The singular vectors of a base matrix; k is the smaller one of its sides."""

    u: Float[Array, "*stack d_in k"]  # of the input space
    v: Float[Array, "*stack k d_out"]  # of the output space


class Intruders(NamedTuple):
    """The leading singular directions of one matrix after fine-tuning."""

    flags: Bool[Array, "*stack k"]  # which of them are intruders
    cosine: Float[Array, "*stack k"]  # c_j
    u: Float[Array, "*stack d_in k"]  # their vectors in the input space
    s: Float[Array, "*stack k"]  # singular values, descending
    v: Float[Array, "*stack k d_out"]  # their vectors in the output space


def basis(before: Float[Array, "*stack d_in d_out"]) -> Basis:
    """The singular vectors of a base matrix, for any number of fine-tuned ones.

    Args:
      before: W, of any floating dtype.

    Returns:
      All of them, in at least float32.
    """
    u, _, v = numerics.svd(before.astype(at_least_float32(before.dtype)))
    return Basis(u, v)


def against(
    base: Basis,
    after: Float[Array, "*stack d_in d_out"],
    top: int = 10,
    epsilon: float = 0.5,
    side: Side = "out",
) -> Intruders:
    """The intruders of a matrix whose base was decomposed before.

    Args:
      base: of W, as `basis` returns it.
      after: W'.
      top: as of `intruders`.
      epsilon: as of `intruders`.
      side: as of `intruders`.

    Returns:
      The leading directions and which of them are intruders.

    Raises:
      ValueError: top < 1, epsilon outside of (0, 1], another side.
    """
    _check(top, epsilon)
    if side not in ("out", "in"):
        raise ValueError(f"side: got {side!r}, expected 'out' or 'in'")
    u, s, v = numerics.svd(after.astype(at_least_float32(after.dtype)))
    u, s, v = u[..., :top], s[..., :top], v[..., :top, :]
    if side == "out":
        dots = numerics.einsum("...io,...jo->...ij", base.v, v)
    else:
        dots = numerics.einsum("...ni,...nj->...ij", base.u, u)
    cosine = jnp.max(jnp.abs(dots), axis=-2)
    return Intruders(cosine < epsilon, cosine, u, s, v)


def intruders(
    before: Float[Array, "*stack d_in d_out"],
    after: Float[Array, "*stack d_in d_out"],
    top: int = 10,
    epsilon: float = 0.5,
    side: Side = "out",
) -> Intruders:
    """The intruders among the leading singular vectors of a matrix.

    Args:
      before: W, of any floating dtype.
      after: W', of the same shape.
      top: k; 10 as in the paper, of a smaller matrix all.
      epsilon: threshold of the cosine in (0, 1]; 0.5 as in the paper.
      side: the space whose vectors are compared: "out" as in the paper, whose left vectors of a
        weight [out, in] are those of the output, or "in".

    Returns:
      The leading directions and which of them are intruders.

    Raises:
      ValueError: matrices of different shapes, top < 1, epsilon outside of (0, 1], another side.
    """
    if before.shape != after.shape:
        raise ValueError(f"after: got shape {after.shape}, expected {before.shape} as before")
    return against(basis(before), after, top, epsilon, side)


def survey(
    before: Tree,
    after: Tree,
    sites: Iterable[Site],
    top: int = 10,
    epsilon: float = 0.5,
    side: Side = "out",
) -> dict[str, Intruders]:
    """The intruders of every site of a model.

    Args:
      before: parameters of the base.
      after: parameters after fine-tuning of any kind; of an adapter ``jl.merge(before, adapter)``.
      sites: of `jl.sites`, or those of an adapter.
      top: k, as of `intruders`.
      epsilon: threshold, as of `intruders`.
      side: as of `intruders`.

    Returns:
      By path; stack axes lead.

    Raises:
      ValueError: a site that one of the trees lacks, or has in another shape; no sites.
    """
    leaves = [flatten(tree)[0] for tree in (before, after)]
    out = {}
    for site in sites:
        pair = [_matrix(x, site, name) for x, name in zip(leaves, ("before", "after"), strict=True)]
        out[site.path] = intruders(pair[0], pair[1], top, epsilon, side)
    if not out:
        raise ValueError("sites: got none, expected at least one weight")
    return out


def counts(
    cosine: Float[Array, "*stack k"], epsilons: Sequence[float] = (0.3, 0.5, 0.7, 0.9)
) -> Int[Array, "n *stack"]:
    """The number of intruders at several thresholds, without another SVD.

    Args:
      cosine: c_j, as `intruders` returns them.
      epsilons: thresholds; 0.3 to 0.9, since a single one says little on its own.

    Returns:
      int32, one row per threshold.

    Raises:
      ValueError: a threshold outside of (0, 1].
    """
    for epsilon in epsilons:
        _check(1, epsilon)
    return jnp.stack([jnp.sum(cosine < e, axis=-1, dtype=jnp.int32) for e in epsilons])


def per_matrix(result: dict[str, Intruders]) -> Float[Array, ""]:
    """The mean number of intruders of a matrix, over sites and layers.

    Args:
      result: of `survey`.

    Returns:
      [] float32.
    """
    flags = [x.flags.reshape(-1, x.flags.shape[-1]).sum(-1) for x in result.values()]
    return jnp.mean(jnp.concatenate(flags).astype(jnp.float32))


def _matrix(leaves: dict[str, Dynamic], site: Site, name: str) -> jax.Array:
    leaf = leaves.get(site.path)
    if leaf is None or tuple(leaf.shape) != site.shape:
        got = "none" if leaf is None else tuple(leaf.shape)
        raise ValueError(f"{name}: {site.path}: got {got}, expected {site.shape}")
    return fold(leaf.dequantize() if hasattr(leaf, "dequantize") else leaf, site.kinds)


def _check(top: int, epsilon: float) -> None:
    if top < 1:
        raise ValueError(f"top: got {top}, expected at least 1")
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon: got {epsilon}, expected in (0, 1]")


SYSTEM = System(
    name="LoRA vs Full Fine-tuning",
    paper="Shuttleworth 2024, 2410.21228",
    symbol="intruders",
    kind="analysis",
    evidence="counts by numpy; planted directions are seen, dense noise is not",
    rows=(44,),
    claim="intruders",
)

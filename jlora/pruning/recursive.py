r"""Relaxed Recursive Transformers: fewer layers, run several times, with LoRA per depth.

===========  ==================================================================================
L, K         layers of the model, and unique layers that are kept; K divides L
W_l          a kernel of layer l, [d_in, d_out]
W'_k         the kernel that all layers l with l mod K = k share
A_l, B_l     factors of layer l, [d_in, r] and [r, d_out]; s is the adapter's `scale`
===========  ==================================================================================

.. math::
    y_l = x \left(W'_{l \bmod K} + s\, A_l B_l\right), \qquad
    W_l - W'_{l \bmod K} \approx U_r \Sigma_r V_r^T, \quad A_l = U_r, \; B_l = \Sigma_r V_r^T / s

The shared kernels start as

- *stepwise*: the K layers at even distances, the first and the last among them;
- *average*: the mean of the layers that a shared one stands for, which leaves the smallest
  :math:`\sum_l \lVert W_l - W'_{l \bmod K} \rVert_F^2`;
- *lower*: the first K layers.

Then both are trained. At full rank the model is the original one, at r = 0 a recursive transformer
with tied layers. The model itself is not changed: `looped` gives it parameters of all L layers, of
which K are stored, and a cache holds keys and values of every depth. `by_depth` gives the adapter
as a bank of L / K adapters of the block, one per run of it, for early exits
(`jlora.pruning.early_exit`) and rows of different depth (`jlora.models.decoder.depth_batching`).

Reference: Bae et al. 2024, arXiv:2410.20672, of which the abstract and summaries were read; a later
    code base of the same first author for the indices of *stepwise* and the means of *average*.
Deviates: leaves that `own` names (norms and biases) stay per layer, so that full rank is exact.
"""

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import numerics
from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.system import System
from jlora.types import Tree

Start = Literal["stepwise", "average", "lower"]
STARTS: tuple[Start, ...] = ("stepwise", "average", "lower")


def tied(
    params: Tree,
    blocks: int,
    start: Start = "average",
    stack: str = r"layers/.*",
    own: str = r".*(norm|bias).*",
) -> Tree:
    """The parameters with the kernels of `blocks` layers instead of all.

    Args:
      params: of the model; every leaf that `stack` names has the layers on its first axis.
      blocks: K, a divisor of the number of layers.
      start: which values the shared kernels have; "average" leaves least to the adapters.
      stack: regex on the paths of leaves of layers.
      own: regex on those of them that every layer keeps.

    Returns:
      The tree that is stored and trained.

    Raises:
      ValueError: no leaf of layers, leaves of different depths, a number of blocks that does not
        divide them, an unknown start.
    """
    if start not in STARTS:
        raise ValueError(f"start: got {start!r}, expected one of {STARTS}")
    leaves, tree = flatten(params)
    shared = [p for p in leaves if re.fullmatch(stack, p) and not re.fullmatch(own, p)]
    depths = {leaves[path].shape[0] for path in shared}
    if len(depths) != 1:
        raise ValueError(f"stack: got {len(shared)} leaves of depths {sorted(depths)}, expected one"
                         f" depth of all leaves that {stack!r} names")  # fmt: skip
    (depth,) = depths
    if blocks < 1 or depth % blocks:
        raise ValueError(f"blocks: got {blocks}, expected a divisor of {depth} layers")
    chosen = {
        "stepwise": np.round(np.linspace(0, depth - 1, blocks)).astype(int),
        "lower": np.arange(blocks),
    }
    for path in shared:
        w = leaves[path]
        if start == "average":
            leaves[path] = w.reshape(depth // blocks, blocks, *w.shape[1:]).mean(0)
        else:
            leaves[path] = w[chosen[start]]
    return jax.tree.unflatten(tree, list(leaves.values()))


def looped(params: Tree, depth: int, stack: str = r"layers/.*") -> Tree:
    """The parameters of all layers: layer l has the kernels of block ``l mod K``.

    Args:
      params: of `tied`.
      depth: L.
      stack: as for `tied`.

    Returns:
      A tree that the model accepts; its gradient by a shared kernel is the sum over the loops.

    Raises:
      ValueError: a leaf whose first axis does not divide the depth.
    """
    leaves, tree = flatten(params)
    for path, w in leaves.items():
        if re.fullmatch(stack, path):
            if w.ndim == 0 or depth % w.shape[0]:
                raise ValueError(
                    f"{path}: got shape {w.shape}, expected a divisor of {depth} first"
                )
            leaves[path] = w[np.arange(depth) % w.shape[0]]
    return jax.tree.unflatten(tree, list(leaves.values()))


def relaxed(adapter: Adapter, params: Tree, shared: Tree) -> Adapter:
    """The adapter whose factors are the truncated SVD of what tying took from each layer.

    Args:
      adapter: LoRA of the model, made for ``looped(shared, depth)``.
      params: of the original model.
      shared: of `tied`.

    Returns:
      The same adapter with other factors; merged at full rank, the weights are the original ones.

    Raises:
      ValueError: a site that is not a stack of kernels [L, d_in, d_out], without factors, or of a
        rank above min(d_in, d_out).
    """
    old, trainable = flatten(params)[0], dict(adapter.trainable)
    kept = flatten(shared)[0]
    for site, _ in adapter.sites:
        arrays = adapter.arrays(site)[0]
        if site.kinds != "sio" or not {"a", "b", "scale"} <= arrays.keys():
            raise ValueError(f"{site.path}: got axes {site.kinds!r} and arrays {sorted(arrays)},"
                             " expected 'sio' and a, b, scale of LoRA")  # fmt: skip
        a, b, scale = arrays["a"], arrays["b"], arrays["scale"]
        rank, least = a.shape[-1], min(site.d_in, site.d_out)
        if rank > least:
            raise ValueError(f"{site.path}: rank: got {rank}, expected at most {least}")
        w, block = old[site.path], kept[site.path]
        rest = w - block[np.arange(len(w)) % len(block)]
        u, sigma, vt = numerics.svd(rest.astype(jnp.float32))
        first = u[..., :rank]
        second = sigma[..., :rank, None] * vt[..., :rank, :]
        second = second / scale.astype(jnp.float32).reshape(-1, 1, 1)
        trainable[site.path] = trainable[site.path] | {
            "a": first.astype(a.dtype), "b": second.astype(b.dtype),
        }  # fmt: skip
    return adapter.replace(trainable=trainable)


def by_depth(adapter: Adapter, blocks: int) -> Adapter:
    """The adapter of all layers as a bank of adapters of the shared block, one per run of it.

    Args:
      adapter: of the looped model; each of its arrays has the L layers on its first axis.
      blocks: K, a divisor of L.

    Returns:
      A bank of L / K, whose entry j holds the factors of layers j K to (j + 1) K - 1.

    Raises:
      ValueError: a site that is not a stack, arrays without the axis of layers, or a number of
        blocks that does not divide them.
    """
    sites = []
    for site, method in adapter.sites:
        own, shared = adapter.arrays(site)
        depth = site.shape[0]
        if site.kinds[0] != "s" or shared or any(t.shape[:1] != (depth,) for t in own.values()):
            raise ValueError(
                f"{site.path}: got axes {site.kinds!r}, expected a stack with arrays of each layer"
            )
        if blocks < 1 or depth % blocks:
            raise ValueError(f"blocks: got {blocks}, expected a divisor of {depth} layers")
        sites.append((dataclasses.replace(site, shape=(blocks, *site.shape[1:])), method))
    cut = jax.tree.map(
        lambda t: t.reshape(-1, blocks, *t.shape[1:]), (adapter.trainable, adapter.frozen)
    )
    return Adapter(*cut, tuple(sites))


SYSTEM = System(
    name="Relaxed Recursive Transformers",
    paper="Bae 2024, 2410.20672",
    symbol="relaxed",
    evidence="full rank is the original model; errors are the tails of singular values, by numpy",
    rows=(19,),
    claim="relaxed_recursive",
    more_claims=("recursive_alone",),
)

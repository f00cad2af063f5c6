r"""LaMDA++: the rank of every matrix by how concentrated the spectrum of its weight is.

==============  ================================================================
W_l             weight of a matrix l, [d_in, d_out]; σ_i its singular values
r_1 < ... < r_n the levels: ranks to hand out
\               r̄ their mean, rounded
E_l             share of the energy of W_l in its first r̄ directions
==============  ================================================================

.. math:: E_l = \frac{\sum_{i \le \bar r} \sigma_i^2}{\sum_i \sigma_i^2}, \qquad
          l \text{ of the } k\text{-th part of all matrices by falling } E_l
          \;\Rightarrow\; \text{rank } r_k

A weight whose energy lies in few directions needs few ranks; a flat spectrum needs many. The parts
are equal in number, so that the mean rank is r̄ whatever the weights are. It costs one SVD per
matrix, before training.

`cut` takes an adapter of `LaMDA` at the largest level to these ranks: columns beyond them are zero
in every array, with gradients of zero, in stacks of layers too.

Paper: Azizi, Kundu and Pedram 2024, arXiv:2406.12832.
Source: abstract ("adaptive rank allocation via normalized spectrum analysis of pre-trained model
weights"); the official code has no part of it.
Deviates: that the parts are equal and which energy decides is our choice.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jlora import numerics
from jlora.contracts.initialisation import Initialisation
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lift import flatten
from jlora.inits.start import check_rank, matrices
from jlora.methods.low_rank.lamda import LaMDA
from jlora.types import Tree

AXES = {"a": (-1,), "core": (-2, -1), "core0": (-2, -1), "b": (-2,), "b0": (-2,)}  # those of ranks


def spectral_ranks(adapter: Adapter, params: Tree, levels: Sequence[int]) -> dict[str, np.ndarray]:
    """The ranks of all matrices.

    Args:
      adapter: for its sites.
      params: the weights, concrete.
      levels: r_1 < ... < r_n, at least 1.

    Returns:
      path -> ranks, int [*stack].

    Raises:
      ValueError: a bank, levels that do not rise from 1 or more, one above min(d_in, d_out), a
        weight that is abstract or not finite.
    """
    one_adapter(adapter, "spectral_ranks")
    if not levels or min(levels) < 1 or sorted(set(levels)) != list(levels):
        raise ValueError(f"levels: got {list(levels)}, expected rising ranks of at least 1")
    mean = round(sum(levels) / len(levels))
    leaves, _ = flatten(params)
    shares: dict[str, np.ndarray] = {}
    for site, _ in adapter.sites:
        check_rank(site, levels[-1], "spectral_ranks")
        shares[site.path] = np.asarray(concentration(matrices(site, leaves[site.path]), mean))
    order = np.argsort(-np.concatenate([s.reshape(-1) for s in shares.values()]), kind="stable")
    flat = np.empty(len(order), int)
    for level, part in zip(levels, np.array_split(order, len(levels)), strict=True):
        flat[part] = level
    ends = np.cumsum([s.size for s in shares.values()])[:-1]
    parts = zip(shares.items(), np.split(flat, ends), strict=True)
    return {path: part.reshape(share.shape) for (path, share), part in parts}


def concentration(w: Float[Array, "*stack d_in d_out"], rank: int) -> Float[Array, "*stack"]:
    """E: the share of a weight's energy in its first directions.

    Args:
      w: weights, [*stack, d_in, d_out].
      rank: how many directions.

    Returns:
      [*stack], in 0..1; 1 for a weight of zeros, which needs no rank.
    """
    energy = jnp.square(numerics.svd(w)[1])
    total = jnp.sum(energy, -1)
    first = jnp.sum(energy[..., :rank], -1)
    return jnp.where(total > 0, first / jnp.where(total > 0, total, 1), 1)


def cut(adapter: Adapter, ranks: Mapping[str, np.ndarray]) -> Adapter:
    """The adapter with the given rank at every matrix, in arrays of the same shapes.

    Args:
      adapter: of `LaMDA`; ranks beyond those given have gradients of zero afterwards.
      ranks: path -> ranks [*stack], as `spectral_ranks` gives them.

    Returns:
      The adapter; sites without an entry are as they were.

    Raises:
      ValueError: another method, ranks that have another shape or exceed the method's.
    """
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for site, method in adapter.sites:
        if site.path not in ranks:
            continue
        if not isinstance(method, LaMDA):
            raise ValueError(f"{site.path}: got {type(method).__name__}, expected LaMDA")
        kept = np.asarray(ranks[site.path])
        if kept.shape != site.stack or kept.min() < 1 or kept.max() > method.rank:
            raise ValueError(
                f"{site.path}: ranks: got {kept.tolist()}, expected {list(site.stack)} numbers in "
                f"1..{method.rank}"
            )
        mask = jnp.asarray(np.arange(method.rank) < kept[..., None])
        for part in (trainable, frozen):
            part[site.path] = {n: _masked(n, t, mask) for n, t in part[site.path].items()}
    return adapter.replace(trainable=trainable, frozen=frozen)


def _masked(name: str, array: Array, mask: Array) -> Array:
    for axis in AXES.get(name, ()):
        along = jnp.expand_dims(mask, -1 if axis == -2 else -2)
        array = jnp.where(along, array, jnp.zeros((), array.dtype))
    return array


SYSTEM = Initialisation(
    name="LaMDA++",
    paper="Azizi 2024, 2406.12832",
    symbol="spectral_ranks",
    evidence="ranks by numpy's SVD; cut ranks stay zero through training",
    rows=(16,),
    claim="lamda_pp",
    method=LaMDA(rank=2),
    initialise=lambda key, adapter, params, statistics: cut(
        adapter, spectral_ranks(adapter, params, (1, 2))
    ),
    reads_weights=True,
)

"""A bank of adapters as a collection: duplicates, clusters, retrieval.

======  ================================================================================
S       cosines of all pairs, [N, N] (`jlora.algebra.similarity`)
c_n, q  condition of adapter n, [N, C]; of the query, [C]
======  ================================================================================

.. math::
    \\text{linkage}(P, Q) = \\frac{1}{|P| |Q|} \\sum_{n \\in P, m \\in Q} S_{nm}, \\qquad
    w_n \\propto \\exp(\\cos(q, c_n) / \\tau)

Clusters are merged from the closest pair on (average linkage). Deltas are compared, not factors:
nothing here depends on the gauge of an adapter. `retrieve` can be jitted and vmapped, the others
return host arrays, because their sizes depend on the data.

Source: textbook.
Deviates: nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jlora import algebra
from jlora.system import System
from jlora.types import Dynamic


class Retrieved(NamedTuple):
    """The adapters closest to a query, closest first."""

    ids: Array  # [k] int32
    weights: Array  # [k], summing to 1
    scores: Array  # [k], cosines


def duplicates(bank: Dynamic, *, cosine: float = 0.999) -> np.ndarray:
    """For each adapter of a bank the first one that it equals.

    An adapter is compared with those kept so far; `np.unique` of the result are the ids to keep.

    Args:
      bank: a bank, or its deltas.
      cosine: from which on two adapters are the same, in (0, 1]; 0.999 tells retrained ones apart.

    Returns:
      [N] int.

    Raises:
      ValueError: a cosine out of range.
    """
    if not 0.0 < cosine <= 1.0:
        raise ValueError(f"cosine: got {cosine}, expected 0 < cosine <= 1")
    s = np.asarray(algebra.similarity(bank))
    first = np.arange(len(s))
    for n in range(len(s)):
        kept = [m for m in range(n) if first[m] == m and s[n, m] >= cosine]
        if kept:
            first[n] = kept[0]
    return first


def cluster(bank: Dynamic, *, count: int | None = None, cosine: float | None = None) -> np.ndarray:
    """A label for each adapter of a bank, numbered in the order of first members.

    Args:
      bank: a bank, or its deltas.
      count: pairs are joined until so many clusters are left, 1..N; None: `cosine` is given.
      cosine: pairs are joined while their linkage is at least this; None: `count` is given.

    Returns:
      [N] int.

    Raises:
      ValueError: not exactly one is given, or a count out of range.
    """
    if (count is None) == (cosine is None):
        raise ValueError(f"got {count=} {cosine=}, expected exactly one of them")
    s = np.asarray(algebra.similarity(bank), np.float64)
    n = len(s)
    if count is not None and not 1 <= count <= n:
        raise ValueError(f"count: got {count}, expected 1 to {n}")
    member, size = np.eye(n, dtype=bool), np.ones(n)
    link = s - np.diag(np.full(n, np.inf))
    left = n
    while left > (count or 1):
        i, j = np.unravel_index(np.argmax(link), link.shape)
        if cosine is not None and link[i, j] < cosine:
            break
        mean = (size[i] * link[i] + size[j] * link[j]) / (size[i] + size[j])
        link[i], link[:, i] = mean, mean
        link[j], link[:, j], link[i, i] = -np.inf, -np.inf, -np.inf
        member[i] |= member[j]
        member[j], size[i], left = False, size[i] + size[j], left - 1
    return member[member.any(1)].T.argmax(1)  # a cluster's row is that of its first member


def retrieve(
    query: Float[Array, "c"],
    conditions: Float[Array, "n c"],
    *,
    count: int,
    temperature: float = 0.1,
) -> Retrieved:
    """The adapters whose conditions are closest to a query.

    Args:
      query: a condition.
      conditions: of the adapters.
      count: how many, 1..N.
      temperature: of the weights, > 0; 0.1.

    Returns:
      Ids, weights and cosines, closest first.

    Raises:
      ValueError: a count or a temperature out of range.
    """
    if not 1 <= count <= conditions.shape[0]:
        raise ValueError(f"count: got {count}, expected 1 to {conditions.shape[0]}")
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, expected more than 0")
    norms = jnp.linalg.norm(conditions, axis=-1) * jnp.linalg.norm(query)
    scores = conditions @ query / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)
    top, ids = jax.lax.top_k(scores, count)
    return Retrieved(ids, jax.nn.softmax(top / temperature), top)


SYSTEM = System(
    name="Duplicates, clusters and retrieval in a bank",
    paper="textbook",
    symbol="cluster",
    evidence="clusters against scipy; gauge-free duplicates; retrieval by numpy",
    kind="component",
)

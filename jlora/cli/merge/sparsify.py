"""How mergekit's methods thin out a task vector: elements kept, the others zero.

=======  =====================================================================================
D        a task vector, any shape; n elements
order    [shape of D] what elements are ranked by, their magnitudes as the models' dtype has them
=======  =====================================================================================

Exactly int(density n) elements are kept, or each with its own probability; of equal ones the
earlier are dropped, or kept, as by mergekit's sorts.

Paper: of each method: `jlora.merging`.
Source: mergekit 0.1.5's definitions (formulas only).
Deviates: random masks are NumPy's.
"""

import numpy as np
from jaxtyping import Bool


def largest(x: np.ndarray, count: int) -> Bool[np.ndarray, "*shape"]:
    """The mask of the largest elements.

    Args:
      x: any array.
      count: how many.

    Returns:
      `count` times True; of equal elements the first.
    """
    flat = x.reshape(-1)
    if count >= flat.size:
        return np.ones(x.shape, bool)
    cut = np.partition(flat, flat.size - count)[flat.size - count] if count else np.inf
    mask = flat > cut
    mask[np.flatnonzero(flat == cut)[: count - int(mask.sum())]] = True
    return mask.reshape(x.shape)


def smallest(x: np.ndarray, count: int) -> Bool[np.ndarray, "*shape"]:
    """The mask of the smallest elements.

    Args:
      x: any array.
      count: how many.

    Returns:
      `count` times True; of equal elements the first.
    """
    return largest(-x, count)


def magnitude(d: np.ndarray, order: np.ndarray, density: float) -> np.ndarray:
    """TIES's trimming: the largest magnitudes are kept.

    Args:
      d: a task vector.
      order: its magnitudes.
      density: the share that is kept, in (0, 1]; at least one element.

    Returns:
      d with zeros.
    """
    if not d.size:
        return np.zeros_like(d)
    return np.where(largest(order, max(1, int(density * d.size))), d, np.float32(0))


def outliers(d: np.ndarray, order: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Breadcrumbs: without the gamma n largest, as far as `density` leaves room, and the small.

    Args:
      d: a task vector.
      order: its magnitudes.
      density: the share that is kept.
      gamma: the share of the largest that is dropped.

    Returns:
      d with zeros.
    """
    keep, top = int(density * d.size), int(gamma * d.size)
    low = max(0, d.size - keep - top)
    return np.where(smallest(order, low + keep) & ~smallest(order, low), d, np.float32(0))


def dropped(
    d: np.ndarray, order: np.ndarray, density: float, rng: np.random.Generator
) -> np.ndarray:
    """DARE: each element is kept with probability `density`.

    Args:
      d: a task vector.
      order: not used.
      density: the probability.
      rng: of the mask.

    Returns:
      d with zeros; not rescaled.
    """
    return np.where(bernoulli(rng, np.full(d.shape, density, np.float32)), d, np.float32(0))


def magprune(
    d: np.ndarray, order: np.ndarray, density: float, epsilon: float, rng: np.random.Generator
) -> np.ndarray:
    """DELLA: kept with probability density -+ epsilon, by the rank of a magnitude in its row.

    Args:
      d: a task vector.
      order: its magnitudes.
      density: the mean probability.
      epsilon: half the span between the smallest and the largest of a row.
      rng: of the mask.

    Returns:
      d with zeros; not rescaled.

    Raises:
      ValueError: unless 0 < density - epsilon and density + epsilon < 1.
    """
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise ValueError(
            f"density, epsilon: got {density}, {epsilon}, expected density +- epsilon in (0, 1)"
        )
    rows = order.reshape(1, -1) if order.ndim < 2 else order
    place = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    share = place.astype(np.float32) / max(rows.shape[1] - 1, 1)
    p = (density - epsilon) + 2 * epsilon * share
    return np.where(bernoulli(rng, p.reshape(d.shape)), d, np.float32(0))


def bernoulli(rng: np.random.Generator, p: np.ndarray) -> Bool[np.ndarray, "*shape"]:
    """A random mask.

    Args:
      rng: its generator.
      p: probabilities.

    Returns:
      True with probability p, each element on its own.
    """
    return rng.random(p.shape, np.float32) < p

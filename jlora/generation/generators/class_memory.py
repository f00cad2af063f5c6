r"""Which class of the training tasks a few texts are of, if of any.

==========  ======================================================================================
e           what is known of a text, [d]; of a class of a new task the mean over its K examples
S           covariance of e within the classes of the memory
g, m_j      mean over the classes of the memory, and mean of class j over its n_j texts
B           [d, p]: e whitened by :math:`S + \rho\,\mathrm{tr}(S)/d\,I`, then the p principal axes
            of the whitened class means
alpha,      logistic regression, on halves of the memory's own classes
beta,
gamma
==========  ======================================================================================

The squared distance to the nearest class is compared with what chance alone would give,

.. math:: t_j = \log \frac{\|B^T (\bar e - m_j)\|^2}{\mathrm{tr}(B^T S B)\,(1/K + 1/n_j)}, \qquad
    r_j = \sigma(\alpha - \beta\, t_j + \gamma \log K - \kappa) \quad \text{for the nearest } j,

with the caution :math:`\kappa`: a class that is wrongly recognised costs more than one that is
missed. Of two classes of a task that are recognised as the same one, neither is:
:math:`r_{cj} \leftarrow r_{cj} (1 - \max_{c' \ne c} r_{c'j})`.

Reference: Fisher 1936 (the axes); Ioffe 2006 (the same question in speaker verification). As part
of a generator original to jlora.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Int

from jlora import numerics

SHRINKAGE = 0.5  # rho
AXES = 40  # p, at most one less than there are classes
SIZES = (4, 8, 16, 32)  # K of the calibration
REPEATS = 6  # of the calibration's halves


class Memory(NamedTuple):
    """Classes of the training tasks."""

    rows: Float[Array, "M D"]  # mean of each class in the space of the discriminant
    places: Float[Array, "M p"]  # B^T (m_j - g)
    counts: Float[Array, "M"]  # n_j
    axes: Float[Array, "d p"]  # B
    centre: Float[Array, "d"]  # g
    spread: Float[Array, ""]  # tr(B^T S B)
    calibration: Float[Array, "3"]  # alpha, beta, gamma


def memory(
    texts: Float[np.ndarray, "N d"], rows: Float[np.ndarray, "N D"], classes: Int[np.ndarray, "N"]
) -> Memory:
    """A memory of labelled texts.

    Args:
      texts: e of each.
      rows: of each, in the space of the discriminant.
      classes: which class a text is of.

    Returns:
      The memory, from sums in float64; calibrated with a fixed seed.

    Raises:
      ValueError: fewer than three classes, or numbers that are not finite.
    """
    x, groups = np.asarray(texts, np.float64), np.asarray(classes)
    kinds = np.unique(groups)
    if len(kinds) < 3 or not (np.isfinite(x).all() and np.isfinite(rows).all()):
        raise ValueError(f"classes: got {len(kinds)} of finite texts, expected at least 3")
    members = [np.flatnonzero(groups == k) for k in kinds]
    means = np.stack([x[own].mean(0) for own in members])
    rest = np.concatenate([x[own] - x[own].mean(0) for own in members])
    within = rest.T @ rest / len(rest)
    variances, basis = np.linalg.eigh(within)
    ridge = SHRINKAGE * np.trace(within) / len(within)
    white = basis / np.sqrt(np.maximum(variances, 0.0) + ridge)
    centre = means.mean(0)
    axes = white @ np.linalg.svd((means - centre) @ white, full_matrices=False)[2].T
    axes = axes[:, : min(AXES, len(kinds) - 1)]
    spread = np.trace(axes.T @ within @ axes)
    calibration = _calibrated((x - centre) @ axes, members, spread)
    of = np.stack([np.asarray(rows, np.float64)[own].mean(0) for own in members])
    sizes = [len(own) for own in members]
    arrays = of, (means - centre) @ axes, sizes, axes, centre, spread, calibration
    return Memory(*(jnp.asarray(np.asarray(t), jnp.float32) for t in arrays))


def _calibrated(
    places: Float[np.ndarray, "N p"], members: list[np.ndarray], spread: float
) -> Float[np.ndarray, "3"]:
    """(alpha, beta, gamma): texts of half of a class against all classes' other halves."""
    rng = np.random.default_rng(0)
    cases: list[tuple[float, float, float]] = []  # t, log K, sign
    for _ in range(REPEATS):
        halves = [rng.permutation(own) for own in members]
        stored = np.stack([places[own[len(own) // 2 :]].mean(0) for own in halves])
        counts = np.asarray([len(own) - len(own) // 2 for own in halves])
        for j, own in enumerate(halves):
            for k in (k for k in SIZES if k <= len(own) // 2):
                square = np.sum((places[own[:k]].mean(0) - stored) ** 2, axis=1)
                t = np.log(square / (spread * (1 / k + 1 / counts)))
                cases += [(t[j], np.log(k), 1.0), (np.delete(t, j).min(), np.log(k), -1.0)]
    if not cases:
        raise ValueError(f"classes: got none of {2 * min(SIZES)} texts, expected some")
    t, size, sign = np.asarray(cases).T

    def loss(v: np.ndarray) -> float:
        logits = v[0] - v[1] * t + v[2] * size
        return float(np.logaddexp(0.0, -sign * logits).mean() + 1e-4 * (v[1] ** 2 + v[2] ** 2))

    return scipy.optimize.minimize(loss, np.asarray([0.0, 1.0, 0.0])).x


def recognised(
    known: Memory,
    means: Float[Array, "C d"],
    counts: Float[Array, "C"],
    caution: float,
) -> tuple[Float[Array, "C"], Float[Array, "C D"]]:
    """Of every class of a new task how surely it is one of the memory's, and that one's row.

    Args:
      known: the memory.
      means: mean of e over the examples of each class.
      counts: K of each class; without an example nothing is recognised.
      caution: kappa.

    Returns:
      (r [C] between 0 and 1, rows [C, D]).
    """
    places = numerics.matmul(means - known.centre[None], known.axes)
    square = jnp.sum((places[:, None] - known.places[None]) ** 2, axis=-1)  # [C, M]
    k = jnp.maximum(counts, 1.0)[:, None]
    t = jnp.log(jnp.maximum(square / (known.spread * (1 / k + 1 / known.counts[None])), 1e-12))
    nearest = jnp.argmin(t, axis=1)
    at = jnp.take_along_axis(t, nearest[:, None], axis=1)[:, 0]
    alpha, beta, gamma = known.calibration
    r = jax.nn.sigmoid(alpha - beta * at + gamma * jnp.log(k[:, 0]) - caution)
    r = jnp.where(counts > 0, r, jnp.zeros_like(r))
    same = (nearest[:, None] == nearest[None]) & ~jnp.eye(len(r), dtype=bool)
    rival = jnp.max(jnp.where(same, r[None], jnp.zeros_like(r)[None]), axis=1)
    return r * (1 - rival), known.rows[nearest]

r"""Calibration of class probabilities: six measures of how far confidence is from accuracy.

==========  ======================================================================================
p_ic        probability of class c for example i, ``probabilities`` [n, C]; y_i its label
M           ``bins``
q, h        what is binned: a number in [0, 1] per example, and whether what it predicts is true
B_m         bin m: of equal width, (m/M, (m+1)/M] and 0 in the first one; or of equal counts
==========  ======================================================================================

With :math:`g_m = |\tfrac{1}{|B_m|} \sum_{i \in B_m} (h_i - q_i)|`, and, of the predicted class,
:math:`q_i = \max_c p_{ic}`, :math:`h_i = [\arg\max_c p_{ic} = y_i]`:

.. math::
    \mathrm{ECE} &= \sum_m \tfrac{|B_m|}{n}\, g_m, \qquad \mathrm{MCE} = \max_m g_m, \qquad
    \mathrm{Brier} = \tfrac1n \sum_i \sum_c (p_{ic} - [y_i = c])^2 \\
    \mathrm{cwECE} &= \tfrac1C \sum_c \sum_m \tfrac{|B_{cm}|}{n}\, g_{cm}, \qquad
    \mathrm{ACE} = \tfrac{1}{C M} \sum_c \sum_m g_{cm}, \qquad
    q_i = p_{ic},\; h_i = [y_i = c]

Bins of cwECE have equal width; those of ACE have equal counts: the examples in the order of p_ic,
floor(n/M) in each, and the rest in the last. TACE is ACE over the examples with
:math:`p_{ic} \ge` ``threshold``, the counts being those of what is kept; with fewer kept than M,
each is a bin of its own. An empty bin adds 0. Examples of equal p_ic are ordered by h_i, so no
measure depends on the order of the examples; of equal probabilities the first class is predicted.

Reference: Guo 2017, 1706.04599 (ECE, MCE); Kull 2019, 1910.12656 (cwECE); Nixon 2019, 1904.01685
(ACE, TACE); Brier 1950. The six are those of HypeLoRA, 2603.19278.
Deviates: HypeLoRA's released TACE pairs probabilities with the labels of other examples; ours does
not, so its figures differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.system import System

BINS, THRESHOLD = 10, 1e-3


class Calibration(NamedTuple):
    """All six measures; less is better, 0 is perfect."""

    ece: Float[Array, ""]  # expected calibration error
    classwise_ece: Float[Array, ""]  # its mean over classes
    mce: Float[Array, ""]  # maximum calibration error
    ace: Float[Array, ""]  # adaptive calibration error
    tace: Float[Array, ""]  # the same above a threshold
    brier: Float[Array, ""]  # squared error of the probabilities, 0 to 2


def measure(
    probabilities: Float[Array, "n C"],
    labels: Int[Array, "n"],
    bins: int = BINS,
    threshold: float = THRESHOLD,
) -> Calibration:
    """All six measures of one model on one set of examples.

    Args:
      probabilities: rows of sum 1.
      labels: of the examples, 0 to C - 1.
      bins: M, at most n; 10 is HypeLoRA's.
      threshold: smallest probability that counts in TACE, below 1; 0.001 is HypeLoRA's.

    Returns:
      `Calibration`.

    Raises:
      ValueError: as `ece` and `tace` do.
    """
    return Calibration(
        ece(probabilities, labels, bins),
        classwise_ece(probabilities, labels, bins),
        mce(probabilities, labels, bins),
        ace(probabilities, labels, bins),
        tace(probabilities, labels, bins, threshold),
        brier(probabilities, labels),
    )


def ece(
    probabilities: Float[Array, "n C"], labels: Int[Array, "n"], bins: int = BINS
) -> Float[Array, ""]:
    """Expected calibration error of the predicted class.

    Args:
      probabilities: rows of sum 1.
      labels: of the examples.
      bins: M, of equal width.

    Returns:
      Between 0 and 1.

    Raises:
      ValueError: shapes that do not fit, or no bins; outside of transformations also rows that are
        no probabilities, and labels that are no class.
    """
    _check(probabilities, labels, bins)
    _, gap = _binned(*_predicted(probabilities, labels), bins)
    return jnp.sum(gap) / len(labels)


def mce(
    probabilities: Float[Array, "n C"], labels: Int[Array, "n"], bins: int = BINS
) -> Float[Array, ""]:
    """Maximum calibration error: the gap of the worst bin.

    Args, Returns and Raises are those of `ece`.
    """
    _check(probabilities, labels, bins)
    count, gap = _binned(*_predicted(probabilities, labels), bins)
    return jnp.max(gap / jnp.maximum(count, jnp.ones_like(count)))


def classwise_ece(
    probabilities: Float[Array, "n C"], labels: Int[Array, "n"], bins: int = BINS
) -> Float[Array, ""]:
    """Expected calibration error of each class against the rest, averaged over classes.

    Args, Returns and Raises are those of `ece`.
    """
    _check(probabilities, labels, bins)

    def one(q: Array, h: Array) -> Array:
        return jnp.sum(_binned(q, h, bins)[1])

    each = jax.vmap(one, in_axes=1)(probabilities, _one_hot(probabilities, labels))
    return jnp.mean(each) / len(labels)


def ace(
    probabilities: Float[Array, "n C"], labels: Int[Array, "n"], bins: int = BINS
) -> Float[Array, ""]:
    """Adaptive calibration error: bins of equal counts, all alike.

    Args, Returns and Raises are those of `ece`; more bins than examples are refused too.
    """
    _check(probabilities, labels, bins, most=len(labels))
    return _adaptive(probabilities, labels, bins, 0.0)


def tace(
    probabilities: Float[Array, "n C"],
    labels: Int[Array, "n"],
    bins: int = BINS,
    threshold: float = THRESHOLD,
) -> Float[Array, ""]:
    """Adaptive calibration error over probabilities that are not tiny.

    Args:
      probabilities: rows of sum 1.
      labels: of the examples.
      bins: M, of equal counts.
      threshold: smallest probability that counts.

    Returns:
      Between 0 and 1.

    Raises:
      ValueError: as `ace`, or a threshold outside of [0, 1).
    """
    _check(probabilities, labels, bins, most=len(labels))
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: got {threshold}, expected 0 <= threshold < 1")
    return _adaptive(probabilities, labels, bins, threshold)


def brier(probabilities: Float[Array, "n C"], labels: Int[Array, "n"]) -> Float[Array, ""]:
    """Brier score, the sum over classes.

    Args:
      probabilities: rows of sum 1.
      labels: of the examples.

    Returns:
      Between 0 and 2; of two classes twice the score of one of them.

    Raises:
      ValueError: as `ece` does.
    """
    _check(probabilities, labels, 1)
    square = jnp.square(probabilities - _one_hot(probabilities, labels))
    return jnp.mean(jnp.sum(square, axis=1))


def _one_hot(p: Array, labels: Array) -> Array:
    return jax.nn.one_hot(labels, p.shape[1], dtype=p.dtype)


def _predicted(p: Array, labels: Array) -> tuple[Array, Array]:
    """q and h of the predicted class."""
    hit = jnp.argmax(p, axis=1).astype(labels.dtype) == labels
    return jnp.max(p, axis=1), hit.astype(p.dtype)


def _binned(q: Array, h: Array, bins: int) -> tuple[Array, Array]:
    """|B_m| and |B_m| g_m of bins of equal width, [M]."""
    edges = jnp.asarray(np.arange(1, bins) / bins, q.dtype)
    at = jnp.searchsorted(edges, q, side="left")  # a number on an edge is in the bin below it
    return _sums(at, jnp.ones_like(q), bins), jnp.abs(_sums(at, h - q, bins))


def _sums(at: Array, values: Array, bins: int) -> Array:
    return jax.ops.segment_sum(values, at, num_segments=bins)


def _adaptive(p: Array, labels: Array, bins: int, threshold: float) -> Array:
    def one(q: Array, h: Array) -> Array:
        order = jnp.lexsort((h, q))
        q, h = q[order], h[order]
        keep = (q >= jnp.asarray(threshold, q.dtype)).astype(q.dtype)
        place = jnp.cumsum(keep.astype(jnp.int32)) - 1  # among what is kept
        each = jnp.maximum((place[-1] + 1) // bins, 1)
        at = jnp.clip(place // each, 0, bins - 1)
        count = _sums(at, keep, bins)
        gap = jnp.abs(_sums(at, keep * (h - q), bins))
        return jnp.mean(gap / jnp.maximum(count, jnp.ones_like(count)))

    return jnp.mean(jax.vmap(one, in_axes=1)(p, _one_hot(p, labels)))


def _check(p: Array, labels: Array, bins: int, most: int | None = None) -> None:
    """Raises ValueError for arguments without a meaning."""
    if p.ndim != 2 or labels.shape != p.shape[:1] or not len(p) or p.shape[1] < 2:
        raise ValueError(
            f"probabilities, labels: got {p.shape}, {labels.shape}, expected (n, C >= 2), (n,)"
        )
    if bins < 1 or (most is not None and bins > most):
        raise ValueError(
            f"bins: got {bins}, expected {f'1 to n = {most}' if most else 'at least 1'}"
        )
    if isinstance(p, jax.core.Tracer) or isinstance(labels, jax.core.Tracer):
        return
    values, classes = np.asarray(p, np.float64), np.asarray(labels)
    # Not finite is neither: comparisons with NaN are false.
    bad = ~((values >= 0).all(1) & (np.abs(values.sum(1) - 1) < 1e-3))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"probabilities[{i}]: got {values[i]}, expected numbers >= 0 of sum 1")
    wrong = (classes < 0) | (classes >= p.shape[1])
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"labels[{i}]: got {classes[i]}, expected 0 to {p.shape[1] - 1}")


SYSTEM = System(
    name="Calibration measures",
    paper="Guo 2017, 1706.04599; Nixon 2019, 1904.01685",
    symbol="measure",
    evidence="numpy loops; scikit-learn's Brier score; calibrated draws; ties and edges",
    kind="analysis",
    rows=(4,),
    claim="calibration",
)

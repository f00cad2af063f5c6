"""Labelled examples as few-shot classifiers take them: checked once, in one place."""

import numpy as np
from jaxtyping import Float, Int


def check(
    examples: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    queries: Float[np.ndarray, "m d"],
) -> int:
    """Refuses what no classifier can learn from.

    Args:
      examples: embeddings of the labelled texts.
      labels: class of each, 0 to C - 1.
      queries: embeddings of the texts to classify.

    Returns:
      C, the number of classes.

    Raises:
      ValueError: arrays of other shapes, numbers that are not finite, fewer than two classes, or a
        class without an example.
    """
    if examples.ndim != 2 or queries.ndim != 2 or examples.shape[1] != queries.shape[1]:
        raise ValueError(
            f"examples, queries: got shapes {examples.shape}, {queries.shape}, expected [n, d],"
            " [m, d]"
        )
    if labels.shape != (len(examples),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: got {labels.dtype}{labels.shape}, expected integers ({len(examples)},)"
        )
    for name, array in (("examples", examples), ("queries", queries)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: got numbers that are not finite")
    if not len(labels) or labels.min() < 0:
        raise ValueError(f"labels: got {labels.tolist()}, expected some, all >= 0")
    counts = np.bincount(labels)
    if len(counts) < 2:
        raise ValueError("labels: got one class, expected at least two")
    if not counts.all():
        raise ValueError(f"labels: class {int(counts.argmin())} of {len(counts)} has no example")
    return len(counts)

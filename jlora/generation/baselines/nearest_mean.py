r"""Nearest class mean: a text belongs to the class whose examples' mean is nearest.

========  =====================================
x_i, y_i  embeddings of the examples, [d], and their classes 0 to C - 1
q         embedding of a text, [d]
========  =====================================

.. math:: s_c(q) = -\Big\| q - \frac{1}{n_c} \sum_{i:\, y_i = c} x_i \Big\|^2

What a user has without any adapter, in one line, from one example per class on: a generator that
knows the same examples has to beat it.

Reference: Tibshirani 2002 (nearest centroids); Snell 2017, 1703.05175 (on embeddings).
Deviates: the embedding is that of a frozen base; no metric is learned.
"""

import numpy as np
from jaxtyping import Float, Int

from jlora.generation.baselines import labelled
from jlora.system import System


def scores(
    examples: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    queries: Float[np.ndarray, "m d"],
) -> Float[np.ndarray, "m C"]:
    """How near each text is to each class.

    Args:
      examples: embeddings of the labelled texts.
      labels: class of each; every class has at least one.
      queries: embeddings of the texts to classify.

    Returns:
      Minus the squared distances to the class means, float64.

    Raises:
      ValueError: as `labelled.check` does.
    """
    classes = labelled.check(examples, labels, queries)
    x, q = examples.astype(np.float64), queries.astype(np.float64)
    means = np.stack([x[labels == c].mean(0) for c in range(classes)])
    return -np.square(q[:, None] - means[None]).sum(-1)


SYSTEM = System(
    name="Nearest class mean of frozen embeddings",
    paper="Tibshirani 2002; Snell 2017, 1703.05175",
    symbol="scores",
    evidence="scikit-learn's NearestCentroid; a class of one example",
    kind="component",
)

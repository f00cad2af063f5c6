r"""k nearest neighbours: the examples nearest to a text vote on its class.

========  ==================================================================
x_i, y_i  embeddings of the examples, [d], and their classes 0 to C - 1
N_k(q)    the k examples nearest to the text q, the first ones on a tie
d_i       Euclidean distance of q and x_i
========  ==================================================================

.. math:: s_c(q) = \sum_{i \in N_k(q),\, y_i = c} \Big( 1 + \frac{1}{(k + 1)(1 + d_i)} \Big)

The second term adds up to less than one vote: it decides between classes with equally many votes,
for the one whose voters are nearer.

Reference: Cover and Hart 1967.
Deviates: ties are decided by nearness and not by chance.
"""

import numpy as np
from jaxtyping import Float, Int

from jlora.generation.baselines import labelled
from jlora.system import System


def scores(
    examples: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    queries: Float[np.ndarray, "m d"],
    k: int,
) -> Float[np.ndarray, "m C"]:
    """Votes of the nearest examples.

    Args:
      examples: embeddings of the labelled texts.
      labels: class of each; every class has at least one.
      queries: embeddings of the texts to classify.
      k: how many examples vote, 1 to n.

    Returns:
      Votes by class, float64.

    Raises:
      ValueError: k outside 1 to n, or as `labelled.check` does.
    """
    classes = labelled.check(examples, labels, queries)
    if not 1 <= k <= len(examples):
        raise ValueError(f"k: got {k}, expected 1 <= k <= {len(examples)} examples")
    x, q = examples.astype(np.float64), queries.astype(np.float64)
    distance = np.sqrt(np.square(q[:, None] - x[None]).sum(-1))  # [m, n]
    near = np.argsort(distance, axis=1, kind="stable")[:, :k]
    vote = 1 + 1 / ((k + 1) * (1 + np.take_along_axis(distance, near, axis=1)))
    return np.einsum("mk,mkc->mc", vote, np.eye(classes)[labels[near]])


SYSTEM = System(
    name="k nearest neighbours of frozen embeddings",
    paper="Cover and Hart 1967",
    symbol="scores",
    evidence="scikit-learn's KNeighborsClassifier; ties by hand",
    kind="component",
)

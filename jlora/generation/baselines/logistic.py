r"""Logistic regression on frozen embeddings: what a user fits before thinking of an adapter.

=========  ==================================================================
x_i, y_i   embeddings of the examples, [d], and their classes 0 to C - 1
W, c       weights [C, d] and intercepts [C]
lambda     ``penalty`` of the weights; the intercepts are free
=========  ==================================================================

.. math:: \min_{W, c}\; \sum_i -\log \mathrm{softmax}(W x_i + c)_{y_i}
    + \frac{\lambda}{2} \|W\|^2

Strictly convex in what it predicts, so that the answer does not depend on a start. Solved in
float64 by SciPy's L-BFGS.

Reference: Cox 1958; Liu and Nocedal 1989 (L-BFGS).
Deviates: two classes have two rows of weights, which is half the penalty of a single row.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from jlora.generation.baselines import labelled
from jlora.system import System


def scores(
    examples: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    queries: Float[np.ndarray, "m d"],
    penalty: float,
) -> Float[np.ndarray, "m C"]:
    """Logits of the fitted model.

    Args:
      examples: embeddings of the labelled texts.
      labels: class of each; every class has at least one.
      queries: embeddings of the texts to classify.
      penalty: lambda > 0.

    Returns:
      W q + c by class, float64.

    Raises:
      ValueError: a penalty that is not above 0, or as `labelled.check` does.
      FloatingPointError: the solver did not converge.
    """
    classes = labelled.check(examples, labels, queries)
    if not penalty > 0:
        raise ValueError(f"penalty: got {penalty}, expected > 0")
    x, d = examples.astype(np.float64), examples.shape[1]
    target = np.eye(classes)[labels]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, free = flat[: classes * d].reshape(classes, d), flat[classes * d :]
        logits = x @ weights.T + free[None]
        logits = logits - logits.max(1, keepdims=True)
        odds = np.exp(logits)
        total = odds.sum(1, keepdims=True)
        loss = (np.log(total[:, 0]) - (logits * target).sum(1)).sum()
        wrong = odds / total - target  # [n, C]
        slope = np.concatenate([(wrong.T @ x + penalty * weights).ravel(), wrong.sum(0)])
        return float(loss + penalty / 2 * np.square(weights).sum()), slope

    options = {"maxiter": 5000, "maxfun": 10_000, "gtol": 1e-6, "ftol": 1e-14}
    start = np.zeros(classes * (d + 1))
    optimum = optimize.minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    steep = float(np.abs(value(optimum.x)[1]).max())
    if steep > 1e-3:
        raise FloatingPointError(
            f"logistic: L-BFGS stopped at a slope of {steep}: {optimum.message}"
        )
    weights, free = optimum.x[: classes * d].reshape(classes, d), optimum.x[classes * d :]
    return queries.astype(np.float64) @ weights.T + free[None]


SYSTEM = System(
    name="Logistic regression on frozen embeddings",
    paper="Cox 1958",
    symbol="scores",
    evidence="scikit-learn's LogisticRegression; the slope at the answer; the limit of a large"
    " penalty",
    kind="component",
)

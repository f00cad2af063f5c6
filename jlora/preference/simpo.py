r"""SimPO: preferences without a reference, by the average log-probability of a token.

============  ========================================================================
c, r          log-probability of the chosen and of the rejected answer, [B]
|y|           tokens of an answer
beta, gamma   scale of the rewards, and the margin between them that is aimed at
============  ========================================================================

.. math:: L = -\log \sigma\Bigl(\frac{\beta}{|y_c|} c - \frac{\beta}{|y_r|} r - \gamma\Bigr)

Nothing is run with the adapter off, and nothing keeps the adapter near the base but its rank.

Paper: Meng et al. 2024, arXiv:2405.14734.
Source: paper.
Deviates: nothing.
"""

import jax
from jaxtyping import Array, Float

from jlora.contracts.preference import LogProbs, Preference, Scorer
from jlora.core.adapter import Adapter
from jlora.types import Batch, Tree


def simpo(policy: LogProbs, *, beta: float = 2.0, gamma: float = 1.0) -> Float[Array, "B"]:
    """The loss of every pair.

    Args:
      policy: of the adapted model; an answer has at least one token.
      beta: scale of the rewards; the paper's are 2 to 10.
      gamma: the margin that is aimed at; the paper's are 0.3 to 1.6.

    Returns:
      [B].

    Raises:
      ValueError: beta not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected > 0")
    chosen = policy.chosen / policy.chosen_length
    rejected = policy.rejected / policy.rejected_length
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def _objective(log_probs: Scorer, params: Tree, adapter: Adapter, batch: Batch) -> Array:
    return simpo(log_probs(params, adapter, batch))


SYSTEM = Preference(
    name="SimPO",
    paper="Meng 2024, 2405.14734",
    symbol="simpo",
    evidence="value by numpy; answers of other lengths",
    missing="preferences over real texts",
    breaks={"shift": "by averages over tokens a constant weighs more in the shorter answer"},
    objective=_objective,
    referenced=False,
)

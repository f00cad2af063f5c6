r"""DPO: the adapter learns to prefer what people prefer, with the base as reference.

======  =============================================================================
h       how much more the adapter prefers the chosen answer than the base does, [B]
beta    how far the adapter may move from the base: larger is nearer
eps     the share of pairs whose label is taken to be wrong (conservative DPO)
======  =============================================================================

.. math:: L = -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h)

At the start h = 0, hence L = log 2.

Paper: Rafailov et al. 2023, arXiv:2305.18290; conservative DPO: Mitchell 2023, a note.
Source: paper.
Deviates: nothing.
"""

import math

import jax
from jaxtyping import Array, Float

from jlora.contracts.preference import LogProbs, Preference
from jlora.preference.pairs import against_base, margin


def dpo(
    policy: LogProbs, reference: LogProbs, *, beta: float = 0.1, smoothing: float = 0.0
) -> Float[Array, "B"]:
    """The loss of every pair.

    Args:
      policy: of the adapted model.
      reference: of the base.
      beta: strength of the pull to the base; 0.1 is the paper's.
      smoothing: eps, at least 0 and below 0.5.

    Returns:
      [B].

    Raises:
      ValueError: beta not above 0, or smoothing outside [0, 0.5).
    """
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected > 0")
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing: got {smoothing}, expected 0 <= smoothing < 0.5")
    h = beta * margin(policy, reference)
    loss = -(1.0 - smoothing) * jax.nn.log_sigmoid(h)
    return loss - smoothing * jax.nn.log_sigmoid(-h) if smoothing else loss


SYSTEM = Preference(
    name="DPO",
    paper="Rafailov 2023, 2305.18290",
    symbol="dpo",
    evidence="value and gradient by numpy; the margin of held-out pairs grows",
    missing="preferences over real texts",
    objective=against_base(dpo),
    start=math.log(2.0),
)

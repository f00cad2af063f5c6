r"""IPO: preferences by regression, so that certain pairs do not push the adapter without end.

======  =============================================================================
h       how much more the adapter prefers the chosen answer than the base does, [B]
tau     regularisation; the margin that is aimed at is 1 / (2 tau)
======  =============================================================================

.. math:: L = \Bigl(h - \frac{1}{2 \tau}\Bigr)^2

At the start L = 1 / (4 tau^2); a margin beyond 1 / (2 tau) is pulled back, which DPO never does.

Paper: Azar et al. 2023, arXiv:2310.12036.
Source: paper.
Deviates: nothing; log-probabilities are sums over tokens, as in the paper.
"""

from jaxtyping import Array, Float

from jlora.contracts.preference import LogProbs, Preference
from jlora.preference.pairs import against_base, margin


def ipo(policy: LogProbs, reference: LogProbs, *, tau: float = 0.1) -> Float[Array, "B"]:
    """The loss of every pair.

    Args:
      policy: of the adapted model.
      reference: of the base.
      tau: regularisation; 0.1 aims at a margin of 5.

    Returns:
      [B].

    Raises:
      ValueError: tau not above 0.
    """
    if not tau > 0:
        raise ValueError(f"tau: got {tau}, expected > 0")
    return (margin(policy, reference) - 0.5 / tau) ** 2


SYSTEM = Preference(
    name="IPO",
    paper="Azar 2023, 2310.12036",
    symbol="ipo",
    evidence="value by numpy; the margin that is aimed at has no gradient",
    missing="preferences over real texts",
    objective=against_base(ipo),
    start=25.0,
)

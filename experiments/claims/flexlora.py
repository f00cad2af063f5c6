"""FlexLoRA: the exact average cut to each client's rank, against zero-padded averages."""

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from jlora.algebra import LowRank
from jlora.contracts.aggregation import Round
from jlora.federated.flexlora import flexlora


def cut(bank, weights):
    """The average of the deltas at the largest rank; clients keep its first columns."""
    u, v = flexlora(bank, weights, ranks=(max(federated_text.MIXED),))
    return Round(LowRank(u[0], v[0]))


CLAIM = federated_text.claim(
    name="flexlora",
    system="FlexLoRA",
    program=rounds.Program("FlexLoRA", cut, ranks=federated_text.MIXED),
    baseline=federated_text.PADDED,
    reference="Bai 2024, 2402.11505: better than averaging factors for mixed ranks",
)

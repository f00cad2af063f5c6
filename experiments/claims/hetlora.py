"""HetLoRA: averages weighted by the norms of deltas, mixed ranks, against plain averages."""

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from jlora.federated import hetlora

CLAIM = federated_text.claim(
    name="hetlora",
    system="HetLoRA",
    program=rounds.Program("HetLoRA", hetlora.SYSTEM.aggregate, ranks=federated_text.MIXED),
    baseline=federated_text.PADDED,
    reference="Cho 2024, 2401.06432: weights by norm are better than zero padding alone",
)

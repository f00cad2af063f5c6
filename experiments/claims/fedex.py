"""FedEx-LoRA: the residual of the average goes into the weight, against FedIT."""

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from jlora.federated import fedex

CLAIM = federated_text.claim(
    name="fedex",
    system="FedEx-LoRA",
    program=rounds.Program("FedEx-LoRA", fedex.SYSTEM.aggregate),
    baseline=federated_text.FEDIT,
    reference="Singhal 2024, 2410.09432: exact aggregation is better than FedIT",
)

"""FLoRA: stacked adapters of mixed ranks against zero-padded averages."""

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from jlora.federated import flora

CLAIM = federated_text.claim(
    name="flora",
    system="FLoRA",
    program=rounds.Program("FLoRA", flora.SYSTEM.aggregate, ranks=federated_text.MIXED, fresh=True),
    baseline=federated_text.PADDED,
    reference="Wang 2024, 2409.05976: better than FedIT with zero padding for mixed ranks",
)

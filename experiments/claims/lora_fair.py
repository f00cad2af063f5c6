"""LoRA-FAIR: a server that corrects the mean of factors, against FedIT."""

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from jlora.federated import lora_fair

CLAIM = federated_text.claim(
    name="lora_fair",
    system="LoRA-FAIR",
    program=rounds.Program("LoRA-FAIR", lora_fair.SYSTEM.aggregate),
    baseline=federated_text.FEDIT,
    reference="Bian 2024, 2411.14961: better than FedIT at equal rounds",
)

"""Fed-SB: averaged cores between fixed bases, at most a point below FedEx-LoRA."""

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from jlora.federated import fed_sb, fedex

RANKS = (12,) * rounds.CLIENTS

CLAIM = federated_text.claim(
    name="fed_sb",
    system="Fed-SB",
    program=rounds.Program("Fed-SB", fed_sb.SYSTEM.aggregate, train="core", ranks=RANKS),
    baseline=rounds.Program("FedEx-LoRA", fedex.SYSTEM.aggregate),
    reference="Singhal 2025, 2502.15436: as good as exact aggregation at a twentieth of the bytes",
    margin=-0.01,
)

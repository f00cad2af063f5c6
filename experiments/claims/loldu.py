"""LoLDU: pivots of the weights' LDU factors are as good as LoRA at less than 1 % of the numbers."""

from experiments.claims import text_methods as lib
from jlora.methods import LoLDU

CLAIM = lib.claim(
    name="loldu",
    systems=("LoLDU",),
    recipe=lib.on_attention("LoLDU of 30 pivots", LoLDU(rank=30, alpha=30.0), 2e-2),
    baseline=lib.lora(4),
    reference="Shi 2024, 2410.13618: comparable at a small part of the trained numbers",
    margin=-0.01,
    parameters="at 1/102 of the trained numbers",
)

"""NOLA: mixtures of random matrices with half of rank-1 LoRA's numbers are as good as it."""

from experiments.claims import text_methods as lib
from jlora.methods import NOLA

CLAIM = lib.claim(
    name="nola",
    systems=("NOLA",),
    recipe=lib.on_attention("NOLA of 192 bases", NOLA(rank=4, alpha=4.0, bases=192), 5e-2),
    baseline=lib.lora(1),
    reference="Koohpayegani 2023, 2310.02556: half the numbers of rank-1 LoRA at no loss",
    margin=-0.005,
    parameters="at 1/2 of the trained numbers",
)

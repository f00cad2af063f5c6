"""FourierFT: a few Fourier coefficients are as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import FourierFT

CLAIM = lib.claim(
    name="fourierft",
    systems=("FourierFT",),
    recipe=lib.on_attention("FourierFT of 512 coefficients", FourierFT(count=512), 1e-1),
    baseline=lib.lora(4),
    reference="Gao 2024, 2405.03003: LoRA's accuracy at a small part of its numbers",
    margin=-0.01,
    parameters="at 1/6 of the trained numbers",
)

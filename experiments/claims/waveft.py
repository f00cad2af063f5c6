"""WaveFT: a few wavelet coefficients are as good as LoRA."""

from experiments.claims import text_methods as lib
from jlora.methods import WaveFT

CLAIM = lib.claim(
    name="waveft",
    systems=("WaveFT",),
    recipe=lib.on_attention("WaveFT of 512 coefficients", WaveFT(count=512), 1e-1),
    baseline=lib.lora(4),
    reference="Bilican 2025, 2505.12532: LoRA's quality at fewer numbers",
    margin=-0.01,
    parameters="at 1/6 of the trained numbers",
)

"""X-LoRA: scalings of frozen adapters per token and layer are better than any fixed merge."""

from experiments.claims import routed_text as lib
from jlora.methods import XLoRA

CLAIM = lib.claim(
    name="xlora",
    systems=("XLoRA",),
    recipe=lib.Recipe("X-LoRA", XLoRA(8, hidden=384, rank=4), 5e-3, zoo=True, states=True),
    baseline="merge",
    reference="Buehler 2024, 2402.07148: mixtures by hidden states beat their parts",
    margin=0.03,
    others=(lib.lora(4),),
)

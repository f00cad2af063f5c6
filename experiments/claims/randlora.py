"""RandLoRA: full rank fits the training rows better than as many numbers at low rank."""

from experiments.claims import text_methods as lib
from jlora.methods import RandLoRA

RANK = 43  # 9 products a kernel of 384 x 384, 3843 numbers; LoRA of rank 5 has 3840

CLAIM = lib.claim(
    name="randlora",
    systems=("RandLoRA",),
    recipe=lib.on_attention("RandLoRA of rank 43", RandLoRA(rank=RANK, alpha=20.0 * RANK), 5e-3),
    baseline=lib.lora(5),
    reference="Albert 2025, 2502.00987: full rank closes the gap to full fine-tuning",
    metric="loss",
    parameters="at equal parameter count",
)

"""Block-LoRA: blocks that share one down-projection are as good as LoRA of the whole rank."""

from experiments.claims import text_methods as lib
from jlora.methods import BlockLoRA

CLAIM = lib.claim(
    name="block_lora",
    systems=("BlockLoRA",),
    recipe=lib.on_attention("Block-LoRA, 4 blocks of 2", BlockLoRA(8, 8.0, 4), 8e-3),
    baseline=lib.lora(8),
    reference="Zhou 2025, 2501.16720: LoRA's accuracy with a shared down-projection",
    margin=-0.01,
    parameters="at 5/8 of the trained numbers",
)

"""LoRA-Pro: nearer to the full gradient at every step, so a lower loss in as many steps."""

import optax

from experiments.claims import factor_optimizers as optimizers
from experiments.claims import text_methods as lib
from jlora.optimizers import lora_pro


def full(schedule):
    """The paper's Adam, on the equivalent gradient."""
    rule = optimizers.with_unit_scale(lora_pro(moments="full"))
    return optax.chain(rule, optax.scale_by_learning_rate(schedule))


def cheap(schedule):
    """Adam on the factors after the change of gradients."""
    rule = optimizers.with_unit_scale(lora_pro())
    return optax.chain(rule, optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))


RECIPE = optimizers.lora_by("LoRA-Pro of rank 4", full, 3e-4)
CLAIM = lib.claim(
    name="lora_pro",
    systems=("LoRA-Pro",),
    recipe=RECIPE,
    baseline=lib.lora(optimizers.RANK),
    reference="Wang 2024, 2407.18242: closes the gap to full fine-tuning that LoRA leaves",
    metric="loss",
    others=(optimizers.lora_by("LoRA-Pro of rank 4, Adam on the factors", cheap, 5e-3),),
    parameters="at equal parameter count",
)

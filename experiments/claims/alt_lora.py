"""AltLoRA+: as low a loss as LoRA-Pro with moments of the factors' size."""

import optax

from experiments.claims import factor_optimizers as optimizers
from experiments.claims import text_methods as lib
from experiments.claims.lora_pro import RECIPE as LORA_PRO
from jlora.optimizers import alt_lora


def solver(adaptive):
    """schedule -> AltLoRA, or AltLoRA+."""

    def make(schedule):
        rule = optimizers.with_unit_scale(alt_lora(adaptive=adaptive))
        return optax.chain(rule, optax.scale_by_learning_rate(schedule))

    return make


CLAIM = lib.claim(
    name="alt_lora",
    systems=("AltLoRA", "AltLoRA+"),
    recipe=optimizers.lora_by("AltLoRA+ of rank 4", solver(True), 1e-2),
    baseline=LORA_PRO,
    reference="Yu 2025, 2505.12455: better than LoRA-Pro at the memory of LoRA",
    metric="loss",
    margin=-0.01,
    others=(
        optimizers.lora_by("AltLoRA of rank 4", solver(False), 3e-1),
        lib.lora(optimizers.RANK),
    ),
    parameters="with moments of rank 4 instead of moments of the full weight",
)

"""LoRA+: a larger learning rate for B than for A is better than one tuned rate for both."""

import optax

import jlora as jl
from experiments.claims import text_methods as lib
from jlora.optimizers.lora_plus import lora_plus


def solver(rate):
    """Adam, the updates of B times 16."""
    return optax.chain(optax.adam(rate), lora_plus(16.0))


METHOD = jl.LoRA(rank=4, alpha=4.0)
CLAIM = lib.claim(
    name="lora_plus",
    systems=("LoRA+",),
    recipe=lib.on_attention("LoRA+ of rank 4", METHOD, 1e-3, solver=solver),
    baseline=lib.lora(4),
    reference="Hayou 2024, 2402.12354: 1 to 2 points better than LoRA",
)

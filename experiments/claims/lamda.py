"""LaMDA: a square core, and an output projection that is soon frozen, are as good as LoRA."""

import optax

from experiments.claims import text_methods as lib
from jlora.methods import LaMDA
from jlora.optimizers.gradual_freeze import gradual_freeze


def solver(rate):
    """Adam, the rows of B frozen over the first 0.3 of all steps."""
    return optax.chain(optax.adam(rate), gradual_freeze(round(0.3 * lib.STEPS)))


METHOD = LaMDA(rank=16, alpha=16.0)
CLAIM = lib.claim(
    name="lamda",
    systems=("LaMDA",),
    recipe=lib.on_attention("LaMDA of rank 16", METHOD, 3e-3, solver=solver),
    baseline=lib.lora(4),
    reference="Azizi 2024, 2406.12832: LoRA's quality at far fewer updated numbers",
    margin=-0.005,
    parameters="with 1/12 of its numbers updated after 0.3 of the steps",
)

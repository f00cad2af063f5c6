"""LoRA-SB: a small core from the first step of full fine-tuning is as good as LoRA."""

import functools

import jlora as jl
from experiments.claims import text_starts as lib


def start(size, data, seed):
    """From the gradient of training rows."""
    del seed
    args = (data.loss, data.params, data.labelled)
    return data.params, jl.inits.lora_sb(*args, methods=lib.methods(24), step=size)


CLAIM = lib.claim(
    name="lora_sb",
    systems=("LoRA-SB",),
    method=lib.Method("LoRA-SB of rank 24", functools.partial(start, 1e-4), 3e-3),
    rank=8,
    reference="Ponkshe 2024, 2411.19557: as good as LoRA with 27 times fewer parameters",
    margin=-0.005,
    metric="accuracy",
    parameters="at 1/10 of the trained numbers",
)

"""Optax transformations that know what A and B are; one file per system."""

from jlora.optimizers.gradual_freeze import gradual_freeze as gradual_freeze
from jlora.optimizers.lora_plus import lora_plus as lora_plus

__all__ = ["gradual_freeze", "lora_plus"]

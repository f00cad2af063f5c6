"""Optax transformations that know what A and B are; one file per system."""

from jlora.optimizers.lora_plus import lora_plus as lora_plus

__all__ = ["lora_plus"]

"""Optax transformations that know what A and B are; one file per system."""

from jlora.optimizers.alt_lora import alt_lora as alt_lora
from jlora.optimizers.gradual_freeze import gradual_freeze as gradual_freeze
from jlora.optimizers.lisa import lisa as lisa
from jlora.optimizers.lora_fa import lora_fa as lora_fa
from jlora.optimizers.lora_plus import lora_plus as lora_plus
from jlora.optimizers.lora_pro import lora_pro as lora_pro
from jlora.optimizers.riemannian import riemannian as riemannian

__all__ = ["alt_lora", "gradual_freeze", "lisa", "lora_fa", "lora_plus", "lora_pro", "riemannian"]

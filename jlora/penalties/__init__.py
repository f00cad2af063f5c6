"""Penalties: scalars added to the loss that keep an adapter's arrays in a form; one file each."""

from jlora.penalties.ba_lora import ba_lora as ba_lora
from jlora.penalties.kasa import kasa as kasa
from jlora.penalties.orthogonality import orthogonality as orthogonality
from jlora.penalties.pego import pego as pego

__all__ = ["ba_lora", "kasa", "orthogonality", "pego"]

"""Penalties: scalars added to the loss that keep an adapter's arrays in a form; one file each."""

from jlora.penalties.kasa import kasa as kasa
from jlora.penalties.orthogonality import orthogonality as orthogonality

__all__ = ["kasa", "orthogonality"]

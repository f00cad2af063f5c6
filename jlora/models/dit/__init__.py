"""A DiT on pixels, with adaLN or FiTv2's AdaLN-LoRA, conditioned on a style and a name."""

from jlora.models.dit.blocks import Traced, block
from jlora.models.dit.checkpoint import load, save
from jlora.models.dit.config import DiTConfig
from jlora.models.dit.model import Condition, Output, cut, forward, init, joined
from jlora.models.dit.modulation import approximated

__all__ = [
    "Condition",
    "DiTConfig",
    "Output",
    "Traced",
    "approximated",
    "block",
    "cut",
    "forward",
    "init",
    "joined",
    "load",
    "save",
]

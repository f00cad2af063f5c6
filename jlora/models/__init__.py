"""Flax models the experiments need, with loaders for published weights."""

from jlora.models.encoder import (
    Encoder,
    EncoderConfig,
    config_from_hf,
    embed,
    load,
    mean_pool,
    run,
    save,
    split,
    tokenizer,
)
from jlora.models.tokenization import Tokenizer

__all__ = [
    "Encoder",
    "EncoderConfig",
    "Tokenizer",
    "config_from_hf",
    "embed",
    "load",
    "mean_pool",
    "run",
    "save",
    "split",
    "tokenizer",
]

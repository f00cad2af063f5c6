"""A decoder of the Llama family: Llama, Mistral, Qwen, SmolLM, Gemma."""

from jlora.models.decoder.attention import Attend, attend, visible
from jlora.models.decoder.checkpoint import load, save
from jlora.models.decoder.config import DecoderConfig, Rope
from jlora.models.decoder.generate import Generated, Sampler, generate, sample
from jlora.models.decoder.gguf_file import (
    chat_template,
    gguf_config,
    gguf_tokenizer,
    load_gguf,
)
from jlora.models.decoder.hf_config import config_from_hf, config_to_hf
from jlora.models.decoder.model import Cache, Decoder, Output, empty_cache, forward, init, loss
from jlora.models.decoder.shifted_attention import ShiftedAttention, interpolated

__all__ = [
    "Attend",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Generated",
    "Output",
    "Rope",
    "Sampler",
    "ShiftedAttention",
    "attend",
    "chat_template",
    "config_from_hf",
    "config_to_hf",
    "empty_cache",
    "forward",
    "generate",
    "gguf_config",
    "gguf_tokenizer",
    "init",
    "interpolated",
    "load",
    "load_gguf",
    "loss",
    "sample",
    "save",
    "visible",
]

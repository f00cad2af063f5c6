"""Adapters in llama.cpp's format, GGUF."""

from jlora.io.gguf.base import GgufBase, gguf_base
from jlora.io.gguf.files import load_gguf, save_gguf

__all__ = ["GgufBase", "gguf_base", "load_gguf", "save_gguf"]

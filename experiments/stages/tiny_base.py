"""A random two-layer encoder with a hashing tokenizer: the base of tests, nothing to download."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import encoder

CONFIG = encoder.EncoderConfig(
    vocab=512, layers=2, width=32, heads=2, ffn=64, max_positions=64, init_std=0.2
)


class HashTokenizer:
    """Words to ids by a checksum; id 0 pads."""

    def encode_batch(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts to ids int32 [n, length] and mask bool [n, length]."""
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            words = text.lower().split()[:length] or ["?"]
            row[: len(words)] = [1 + zlib.crc32(w.encode()) % (CONFIG.vocab - 1) for w in words]
        return ids, ids > 0


def make() -> tuple[encoder.EncoderConfig, dict, HashTokenizer]:
    """(config, parameters drawn from key 0, tokenizer)."""
    ids = jnp.zeros((1, 4), jnp.int32)
    params = encoder.Encoder(CONFIG).init(jax.random.key(0), ids, ids == 0)["params"]
    return CONFIG, dict(params), HashTokenizer()

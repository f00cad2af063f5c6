"""A random two-layer encoder with a hashing tokenizer: the base of tests, nothing to download."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.task import SEPARATOR
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

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same of pairs of texts: the longer one is cut until both and a mark fit."""
        rows = []
        for first, second in pairs:
            a, b = first.split(), second.split()
            spare = max(0, len(a) + len(b) + 1 - length)
            more = min(spare, abs(len(a) - len(b)))  # off the longer one, then off both in turn
            off_a, off_b = (more, 0) if len(a) > len(b) else (0, more)
            half, odd = divmod(spare - more, 2)
            rows.append(" ".join([*a[: len(a) - off_a - half], SEPARATOR,
                                  *b[: len(b) - off_b - half - odd]]))  # fmt: skip
        return self.encode_batch(rows, length)


def make() -> tuple[encoder.EncoderConfig, dict, HashTokenizer]:
    """(config, parameters drawn from key 0, tokenizer)."""
    ids = jnp.zeros((1, 4), jnp.int32)
    params = encoder.Encoder(CONFIG).init(jax.random.key(0), ids, ids == 0)["params"]
    return CONFIG, dict(params), HashTokenizer()

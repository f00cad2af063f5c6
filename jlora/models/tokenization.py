"""Texts to fixed-length token arrays, by the fast tokenizer stored alongside a checkpoint.

``tokenizer(directory)`` reads ``tokenizer.json``. ``encode_batch(texts, length)`` gives ``ids``
int32 ``[n, t]`` and ``mask`` bool ``[n, t]`` (True = a token), ``t == length``: longer texts are
cut (closing special tokens kept), shorter ones padded on the right.

Errors: ``FileNotFoundError`` without the file; ``ValueError`` for a length that does not even hold
the special tokens, or a tokenizer without a padding token; ``TypeError`` for a text that is not a
string.

``encode_pairs(pairs, length)`` gives the same of pairs of texts, of which the longer one is cut
first. Segment ids are not returned: an encoder that was trained on single texts has but one.

Source: ``tokenizers`` library.
Deviates: padding and truncation stored in the file are replaced, so shapes depend on ``length``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Fast


class Tokenizer:
    """Deterministic ``encode_batch`` over one vocabulary; host code, not traceable."""

    def __init__(self, fast: Fast, pad: str = "[PAD]"):
        pad_id = fast.token_to_id(pad)
        if pad_id is None:
            raise ValueError(f"tokenizer: padding token {pad!r} is not in the vocabulary")
        self._fast, self._pad, self.pad_id = fast, pad, pad_id

    @property
    def vocab(self) -> int:
        """Number of tokens, added ones included."""
        return self._fast.get_vocab_size()

    def encode_batch(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token arrays of one length.

        Args:
          texts: n strings.
          length: t, tokens per row; longer texts are cut (closing special tokens kept), shorter
            ones padded
            on the right.

        Returns:
          ids int32 [n, t], and mask bool [n, t], True for a token.

        Raises:
          TypeError: a text that is not a string.
          ValueError: a length that does not even hold the special tokens.
        """
        if isinstance(texts, str):
            raise TypeError("texts: got one str, expected a sequence of str")
        if bad := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise TypeError(f"texts[{bad[0]}]: got {type(texts[bad[0]]).__name__}, expected str")
        special = self._fast.num_special_tokens_to_add(False)
        if length <= special:
            raise ValueError(f"length: got {length}, expected more than {special} special tokens")
        return self._arrays(list(texts), length)

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token arrays of pairs of texts, with the tokenizer's separator between them.

        Args:
          pairs: n times two strings.
          length: t, tokens per row; tokens are taken off the longer text of a pair first.

        Returns:
          ids int32 [n, t], and mask bool [n, t], True for a token.

        Raises:
          ValueError: a length that does not hold the special tokens and a token of each text.
        """
        special = self._fast.num_special_tokens_to_add(True)
        if length < special + 2:
            raise ValueError(f"length: got {length}, expected >= {special + 2} for a pair of texts")
        return self._arrays([(first, second) for first, second in pairs], length)

    def _arrays(
        self, rows: list[str] | list[tuple[str, str]], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self._fast.enable_truncation(max_length=length, strategy="longest_first")
        self._fast.enable_padding(length=length, pad_id=self.pad_id, pad_token=self._pad)
        encodings = self._fast.encode_batch(rows)
        ids = np.asarray([row.ids for row in encodings], np.int32).reshape(len(rows), length)
        mask = np.asarray([row.attention_mask for row in encodings], bool).reshape(
            len(rows), length
        )
        return ids, mask


def tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Args:
      directory: holds ``tokenizer.json``.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the vocabulary has no token [PAD].
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return Tokenizer(Fast.from_file(str(path)))

"""A byte-pair encoding trained on the training documents, and documents as one stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.pretraining.texts import Document

END = "<|endoftext|>"  # token 0, after every document


def train(documents: Sequence[Document], vocab: int) -> Tokenizer:
    """A byte-level encoding: every text has tokens, and decoding gives the text back.

    Args:
      documents: held-out ones are left out.
      vocab: tokens, 256 bytes and END among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((d.text for d in documents if not d.held_out), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(
            f"vocab: got {tokenizer.get_vocab_size()} tokens of these texts, expected {vocab}"
        )
    return tokenizer


def stream(tokenizer: Tokenizer, documents: Sequence[Document], held_out: bool) -> np.ndarray:
    """Tokens of the training or the held-out documents one after the other, each before an END.

    Args:
      tokenizer: of `train`.
      documents: of both kinds.
      held_out: which kind.

    Returns:
      uint16 [tokens].
    """
    end = tokenizer.token_to_id(END)
    texts = [d.text for d in documents if d.held_out == held_out]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, end], np.uint16) for e in encoded])


def lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of each token's text, int64 [vocab]; END has none."""
    size = tokenizer.get_vocab_size()
    words = [tokenizer.id_to_token(i) or "" for i in range(size)]
    return np.array([0 if w == END else len(w) for w in words], np.int64)  # a character per byte


def read(path: Path) -> Tokenizer:
    """The encoding in a tokenizer.json."""
    return Tokenizer.from_file(str(path))

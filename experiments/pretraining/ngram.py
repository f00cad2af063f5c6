r"""An interpolated n-gram model by Kneser and Ney: what a language model has to be better than.

.. math::
    p_n(w \mid h) = \frac{\max(c(hw) - D_n, 0)}{c(h)}
    + \frac{D_n\, t(h)}{c(h)}\, p_{n-1}(w \mid h'), \qquad D_n = \frac{n_1}{n_1 + 2 n_2}

Symbols: context h of n - 1 tokens, h' without its first; c counts n-grams at the highest order, and
below it the different tokens that come before an n-gram; t(h) different tokens after h;
:math:`n_1, n_2` n-grams counted once and twice. :math:`p_0` is uniform; an unseen h passes on
:math:`p_{n-1}`. Unigrams of the card are relative frequencies with one added.

Reference: Kneser & Ney 1995; Chen & Goodman 1999.
"""

from __future__ import annotations

import numpy as np


def unigram(train: np.ndarray, held_out: np.ndarray, vocab: int) -> np.ndarray:
    """Cross-entropy in nats of each token under the frequencies of the training stream.

    Args:
      train: tokens. held_out: tokens. vocab: how many different ones there are.

    Returns:
      float64 of the shape of `held_out`.
    """
    counts = np.bincount(train, minlength=vocab) + 1.0
    return -np.log(counts / counts.sum())[held_out]


def interpolated(train: np.ndarray, held_out: np.ndarray, vocab: int, order: int = 4) -> np.ndarray:
    """Cross-entropy in nats of each token of a stream, given the order - 1 tokens before it.

    Args:
      train: tokens.
      held_out: tokens; the first ones have shorter contexts.
      vocab: how many different ones there are; ``vocab ** order`` fits int64.
      order: the longest n-gram.

    Returns:
      float64 [tokens].

    Raises:
      ValueError: n-grams that do not fit an integer.
    """
    if vocab**order >= 2**63:
        raise ValueError(f"order: got {order} of {vocab} tokens, expected vocab ** order < 2**63")
    grams, counts = np.unique(_packed(train, order, vocab), return_counts=True)
    levels = [(grams, counts)]
    for n in range(order - 1, 0, -1):  # the different tokens before an n-gram
        longer = np.unique(_packed(train, n + 1, vocab))
        levels.append(np.unique(longer % vocab**n, return_counts=True))
    p = np.full(len(held_out), 1.0 / vocab)
    for n, (grams, counts) in enumerate(reversed(levels), 1):
        p[n - 1 :] = _level(grams, counts, _packed(held_out, n, vocab), p[n - 1 :], vocab)
    return -np.log(p)


def _packed(stream: np.ndarray, n: int, vocab: int) -> np.ndarray:
    """Every n-gram of a stream as one integer, its context in the high digits."""
    keys = np.zeros(len(stream) - n + 1, np.int64)
    for i in range(n):
        keys = keys * vocab + stream[i : len(stream) - n + 1 + i].astype(np.int64)
    return keys


def _level(
    grams: np.ndarray, counts: np.ndarray, asked: np.ndarray, lower: np.ndarray, vocab: int
) -> np.ndarray:
    """p_n of the n-grams `asked`, given p_(n-1) of the same tokens."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.0
    contexts, starts = np.unique(grams // vocab, return_index=True)  # grams are sorted
    total = np.add.reduceat(counts, starts)
    types = np.diff(np.append(starts, len(grams)))
    at = np.minimum(np.searchsorted(grams, asked), len(grams) - 1)
    count = np.where(grams[at] == asked, counts[at], 0)
    where = np.minimum(np.searchsorted(contexts, asked // vocab), len(contexts) - 1)
    seen = contexts[where] == asked // vocab
    own = np.maximum(count - discount, 0) / total[where]
    return np.where(seen, own + discount * types[where] / total[where] * lower, lower)

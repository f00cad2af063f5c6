"""Documents in rows of one length, as few rows as a simple rule finds.

Longest first, each into the fullest row that still has room. The documents of a row are told apart
by `segments`, which attention reads, and by `positions`, which start at 0 in each: no token sees
another document. The first token of a document is never learned, as it would be predicted by the
document before it.

Reference: Krell et al. 2021 (arXiv:2107.02027), best fit decreasing.
Deviates: documents are placed one by one; the paper packs a histogram of lengths, which is faster
for millions of them and leaves open which document is where.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.finetuning.chat import Document

PADDING = -1  # segment of the places behind the last document


class Rows(NamedTuple):
    """Packed rows, or any stack of them; of numpy or JAX."""

    ids: Any  # int32 [n, length]; 0 in padding
    positions: Any  # int32 [n, length]
    segments: Any  # int32 [n, length]; PADDING where there is no document
    weights: Any  # float32 [n, length]: 1 for tokens that are learned


def assign(lengths: Sequence[int], size: int, pack: bool = True) -> list[list[int]]:
    """Which documents each row holds.

    Args:
      lengths: of the documents, each at most `size`.
      size: of a row.
      pack: False: one document per row.
    """
    if not pack:
        return [[n] for n in range(len(lengths))]
    rows: list[list[int]] = []
    open_: dict[int, list[int]] = defaultdict(list)  # room left -> rows
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        need = lengths[n]
        room = next((r for r in range(need, size) if open_[r]), size)
        row = open_[room].pop() if room < size else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(n)
        open_[room - need].append(row)
    return rows


def fit(
    documents: Sequence[Document], size: int, long: str
) -> tuple[list[Document], list[Document]]:
    """The documents that fit in a row, and those that do not.

    Args:
      documents: of the data.
      size: tokens of a row.
      long: "error", or "drop".

    Raises:
      ValueError: with "error", the first document longer than a row; with "drop", all are.
    """
    kept = [d for d in documents if len(d.ids) <= size]
    over = [d for d in documents if len(d.ids) > size]
    if over and (long == "error" or not kept):
        raise ValueError(
            f"{over[0].where}: got {len(over[0].ids)} tokens, expected at most max_length={size}"
            f" ({len(over)} such examples; --long=drop leaves them out)"
        )
    return kept, over


def rows(documents: Sequence[Document], size: int, pack: bool = True) -> Rows:
    """Documents as rows.

    Args:
      documents: each of at most `size` tokens.
      size: tokens of a row.
      pack: False: one document per row.
    """
    places = assign([len(d.ids) for d in documents], size, pack)
    out = empty(len(places), size)
    for r, members in enumerate(places):
        at = 0
        for segment, n in enumerate(members):
            ids, learned, _ = documents[n]
            here = slice(at, at + len(ids))
            out.ids[r, here] = ids
            out.positions[r, here] = np.arange(len(ids))
            out.segments[r, here] = segment
            out.weights[r, here] = learned
            out.weights[r, at] = 0
            at += len(ids)
    return out


def empty(count: int, size: int) -> Rows:
    """Rows without documents."""
    shape = (count, size)
    zeros = np.zeros(shape, np.int32)
    segments = np.full(shape, PADDING, np.int32)
    return Rows(zeros, zeros.copy(), segments, np.zeros(shape, np.float32))

"""A row by hand: samples behind each other, whole blocks per job, padding that belongs to none."""

import numpy as np
import pytest

from jlora.packing.jobs import Piece
from jlora.packing.layout import PADDING, row

HELD = (Piece(0, 0, 0, 2), Piece(0, 0, 1, 3), Piece(2, 1, 0, 3))


def tokens(piece):
    return np.arange(piece.length) + 10 * (1 + piece.job) + piece.sample


def test_a_row_by_hand():
    got = row(HELD, tokens, 16, 4)
    assert got.ids.tolist() == [10, 11, 11, 12, 13, 0, 0, 0, 30, 31, 32, 0, 0, 0, 0, 0]
    assert got.positions.tolist() == [0, 1, 0, 1, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]
    p = PADDING
    assert got.segments.tolist() == [0, 0, 1, 1, 1, p, p, p, 2, 2, 2, p, p, p, p, p]
    assert got.jobs.tolist() == [0, 0, 2, 0]


def test_a_bubble_is_padding():
    got = row((), tokens, 8, 4)
    assert not got.ids.any() and (got.segments == PADDING).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="takes 3 blocks of 4 tokens, expected at most 8 tokens"):
        row(HELD, tokens, 8, 4)
    with pytest.raises(ValueError, match=r"got tokens \(1,\), expected \(2,\)"):
        row(HELD, lambda piece: np.zeros(1, int), 16, 4)

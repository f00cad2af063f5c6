"""Bins against an exhaustive search; the order of the greedy rule; the emptiest microbatch last."""

import itertools

import numpy as np
import pytest

from jlora.packing import bins
from jlora.packing.jobs import Piece, blocks


def pieces(seed, count=6, jobs=2):
    rng = np.random.default_rng(seed)
    return [Piece(int(rng.integers(jobs)), 0, i, int(rng.integers(1, 17))) for i in range(count)]


def exhaustive(held, capacity, block):
    """(fewest bins, fewest blocks of the emptiest bin among those), over all assignments."""
    best = None
    for assignment in itertools.product(range(len(held)), repeat=len(held)):
        if any(a > max(assignment[:i], default=-1) + 1 for i, a in enumerate(assignment)):
            continue  # the same partition under other names
        parts = [[p for p, a in zip(held, assignment, strict=True) if a == j]
                 for j in range(max(assignment) + 1)]  # fmt: skip
        sizes = [blocks(part, block) for part in parts]
        if max(sizes) * block <= capacity:
            best = min(best or (99, 99), (len(parts), min(sizes)))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_what_exhaustive_search_finds(seed):
    held = pieces(seed)
    made = bins.milp(held, 24, 4)
    assert sorted(p for b in made for p in b) == sorted(held)
    assert all(blocks(b, 4) * 4 <= 24 for b in made)
    got = (len(made), blocks(made[-1], 4))
    assert got == exhaustive(held, 24, 4)
    assert bins.bound(held, 24, 4) <= len(made) <= len(bins.first_fit(held, 24, 4))


def test_it_is_better_than_the_greedy_rule_where_that_is_wrong():
    held = [Piece(0, 0, i, n) for i, n in enumerate((4, 4, 5, 5, 3, 3, 3, 3))]  # 30 in 3 x 10
    assert len(bins.first_fit(held, 10, 1)) == 4
    made = bins.milp(held, 10, 1)
    assert len(made) == 3 and all(sum(p.length for p in b) == 10 for b in made)


def test_the_greedy_rule_takes_the_longest_first():
    held = [Piece(0, 0, 0, 2), Piece(0, 0, 1, 7), Piece(1, 0, 0, 4)]
    made = bins.first_fit(held, 12, 4)
    assert made == [(held[1], held[2]), (held[0],)]  # together they are four blocks, as 9 is three
    assert blocks(held, 4) == 3 + 1


def test_without_time_it_is_the_greedy_rule(monkeypatch):
    held = [Piece(0, 0, i, n) for i, n in enumerate((4, 4, 5, 5, 3, 3, 3, 3))]
    monkeypatch.setattr(bins, "_solve", lambda *a, **k: None)  # no solution within the limit
    assert bins.milp(held, 10, 1) == bins.first_fit(held, 10, 1)

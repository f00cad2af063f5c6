"""Blocks of a microbatch by hand; what no plan can hold."""

import pytest

from jlora.packing.jobs import Job, Piece, blocks, check, pieces_of

JOBS = (Job("a", ((3, 5), (2,))), Job("b", ((7,),)))


def test_tokens_of_each_job_are_padded_separately():
    held = [Piece(0, 0, 0, 3), Piece(0, 0, 1, 5), Piece(1, 0, 0, 7)]
    assert blocks(held, 4) == 2 + 2  # 8 and 7 tokens
    assert blocks(held, 16) == 2  # one sum of 15 would be 1
    assert blocks([], 4) == 0


def test_a_job_that_has_ended_adds_nothing():
    assert pieces_of(JOBS, (0, 1), 0) == [Piece(0, 0, 0, 3), Piece(0, 0, 1, 5), Piece(1, 0, 0, 7)]
    assert pieces_of(JOBS, (1, 0), 1) == [Piece(0, 1, 0, 2)]


@pytest.mark.parametrize(("jobs", "capacity", "block", "said"), [
    ((), 8, 4, "got none"),
    (JOBS, 6, 4, "capacity: got 6, expected a multiple of the block, 4"),
    (JOBS, 8, 0, "capacity: got 8"),
    ((JOBS[0], JOBS[0]), 8, 4, "the name 'a' twice"),
    ((Job("a", ()),), 8, 4, "a: got no global batch"),
    ((Job("a", ((),)),), 8, 4, "a: batch 0: got no samples"),
    ((Job("a", ((9,),)),), 8, 4, "a sample of 9 tokens, expected 1 to 8"),
    ((Job("a", ((0,),)),), 8, 4, "a sample of 0 tokens"),
])  # fmt: skip
def test_what_no_plan_can_hold_is_refused(jobs, capacity, block, said):
    with pytest.raises(ValueError, match=said):
        check(jobs, capacity, block)
    check(JOBS, 8, 4)

"""Plans of random jobs, and what `verify` sees in plans that somebody broke."""

import numpy as np
import pytest

from jlora.packing import bins
from jlora.packing.jobs import Job, Piece, blocks
from jlora.packing.schedule import Plan, plan, rows, verify, waste


def jobs(seed, count=5):
    rng = np.random.default_rng(seed)
    made = []
    for n, mean in enumerate(rng.uniform(4, 20, count)):
        lengths = [rng.poisson(mean, rng.integers(2, 6)) for _ in range(int(rng.integers(1, 4)))]
        batches = (tuple(int(t) for t in np.clip(batch, 1, 32)) for batch in lengths)
        made.append(Job(f"job {n}", tuple(batches)))
    return made


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_plans_hold(seed, stages):
    held = jobs(seed)
    made = plan(held, 64, 8, stages, pack=bins.first_fit)
    verify(made, held, 64, 8, stages)
    assert sum(len(s) for s in made.steps) == sum(len(j.batches) for j in held)
    assert stages > 1 or all(made.microbatches)  # without a pipeline there are no bubbles


def test_waste_counts_whole_rows():
    held = jobs(3)
    made = plan(held, 64, 8)
    got = waste(rows(made, 4), held, 64)
    tokens = sum(sum(b) for j in held for b in j.batches)
    padded = sum(len(b) * max(b) for j in held for b in j.batches)
    assert got.alone == pytest.approx(1 - tokens / padded)
    steps = len(rows(made, 4))
    assert got.packed == pytest.approx(1 - tokens / (4 * 64 * steps))
    assert got.empty == 4 * steps - len(made.microbatches) > 0
    assert waste(rows(made, 1), held, 64).packed < got.packed  # empty rows are computed too


def test_neighbours_join_where_they_fit():
    held = [Job("a", ((8,),)), Job("b", ((8,),)), Job("c", ((8,),)), Job("d", ((8,),))]
    made = plan(held, 32, 8)
    assert len(made.groups) == 2 and len(made.microbatches) == 1
    assert made.steps == ((0, 1, 2, 3),)
    assert len(plan(held, 16, 8).microbatches) == 2


def test_a_pipeline_waits_for_weights():
    held = [Job("a", ((8,), (8,), (8,)))]
    assert plan(held, 8, 8, 1).microbatches == tuple((Piece(0, g, 0, 8),) for g in range(3))
    waits = plan(held, 8, 8, 3)
    assert [bool(m) for m in waits.microbatches] == [True, False, False, True, False, False, True]
    assert waste(rows(waits, 1), held, 8).empty == 4
    with pytest.raises(ValueError, match="stages: got 0"):
        plan(held, 8, 8, 0)


A, B = Piece(0, 0, 0, 8), Piece(0, 1, 0, 8)
HELD = [Job("a", ((8,), (8,)))]
GOOD = Plan(((A,), (B,)), ((0,), (0,)), ((0,),))


@pytest.mark.parametrize(("broken", "stages", "said"), [
    (GOOD._replace(microbatches=((A,),), steps=((0,),)), 1, "expected each of 2 once; missing"),
    (GOOD._replace(microbatches=((A,), (A,))), 1, "expected each of 2 once"),
    (GOOD._replace(microbatches=((A,), (B._replace(length=7),))), 1, "surplus"),
    (GOOD._replace(microbatches=((A, B),), steps=((0,),)), 1, "over the capacity"),
    (GOOD._replace(microbatches=((B,), (A,))), 1, "a: batch 1 starts at microbatch 0"),
    (GOOD, 2, "expected 2 or later"),
    (GOOD._replace(steps=((), (0,))), 1, "steps: expected"),
])  # fmt: skip
def test_broken_plans_are_seen(broken, stages, said):
    verify(GOOD, HELD, 8, 8)
    with pytest.raises(ValueError, match=said):
        verify(broken, HELD, 8, 8, stages)


def test_two_batches_of_one_job_in_one_microbatch_are_seen():
    small = [Job("a", ((3,), (4,)))]
    both = ((Piece(0, 0, 0, 3), Piece(0, 1, 0, 4)),)
    assert blocks(both[0], 8) == 1
    with pytest.raises(ValueError, match="two global batches of one job"):
        verify(Plan(both, ((0,),), ((0,),)), small, 8, 8)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_rows_keep_the_order_and_hold_one_batch_of_a_job(seed, count):
    held = jobs(seed)
    made = plan(held, 32, 8, pack=bins.first_fit)
    got = rows(made, count)
    assert all(len(r.microbatches) == count for r in got)
    assert tuple(m for r in got for m in r.microbatches if m) == made.microbatches
    assert sum(len(r.steps) for r in got) == sum(len(j.batches) for j in held)
    for r in got:
        present = {(p.job, p.batch) for m in r.microbatches for p in m}
        assert len(present) == len({job for job, _ in present})
    if count == 1:
        assert tuple(r.steps for r in got) == made.steps
    else:
        assert len(got) < len(made.microbatches)


def test_a_second_batch_starts_a_new_step():
    assert [r.microbatches for r in rows(GOOD, 2)] == [((A,), ()), ((B,), ())]
    with pytest.raises(ValueError, match="rows: got 0"):
        rows(GOOD, 0)

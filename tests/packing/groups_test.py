"""Short with long; no pair that leaves the others too little to fill the pipeline with."""

import math

import numpy as np
import pytest

from jlora.packing import groups
from jlora.packing.jobs import Job


def job(name, length, count=4, batches=2):
    return Job(name, ((length,) * count,) * batches)


JOBS = [job("a", 30), job("b", 4), job("c", 16), job("d", 8), job("e", 60)]


def test_the_shortest_goes_with_the_longest():
    assert groups.pairs(JOBS, 64, 1) == ((1, 4), (3, 0), (2,))


def test_the_lower_bound_is_that_of_the_docstring():
    varied = Job("v", ((10, 20), (50,), (5, 5, 5)))
    tokens = np.array([30, 50, 15], float)
    want = math.ceil((tokens.mean() - tokens.std() / 4 + 120) / 20)
    assert groups.least([varied, job("w", 30)], (0, 1), 20) == want
    assert groups.least([job("tiny", 1, 1)], (0,), 100) == 1


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 40])
def test_pairs_are_split_until_the_others_fill_the_pipeline(stages):
    made = groups.pairs(JOBS, 128, stages)
    assert sorted(m for g in made for m in g) == list(range(5))
    assert groups.fills(JOBS, made, 128, stages) or all(len(g) == 1 for g in made)
    if stages == 40:  # nothing fills it
        assert not groups.fills(JOBS, made, 128, stages)


def test_a_split_takes_the_pair_with_most_tokens():
    made = groups.pairs(JOBS[:4], 64, 3)  # pairs need 3 and 2 microbatches; each wants 2 elsewhere
    assert made == ((1, 0), (3, 2))
    made = groups.pairs(JOBS[:4], 128, 2)
    assert made == ((1, 0), (3, 2))
    assert groups.pairs(JOBS[:4], 128, 3) == ((1,), (0,), (3, 2))

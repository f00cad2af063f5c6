"""One adapter per task: each is its own, all from one start."""

import jax
import pytest

import jlora as jl
from jlora.continual.separate import adapter, init, start, update
from jlora.contracts import tiny

FRESH = tiny.fresh(jl.LoRA(2), tiny.params())


def test_every_task_keeps_its_own():
    state, trained = init(FRESH), []
    for k in range(3):
        assert start(jax.random.key(k), state) is FRESH
        trained.append(tiny.moved(FRESH, k))
        state = update(state, trained[-1])
        assert all(adapter(state, t) is trained[t] for t in range(k + 1))
    with pytest.raises(IndexError, match="task -1: got 3 tasks so far"):
        adapter(state, -1)

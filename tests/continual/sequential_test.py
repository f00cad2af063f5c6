"""Sequential fine-tuning: what it carries from task to task."""

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.continual.sequential import adapter, init, start, update
from jlora.contracts import tiny

FRESH = tiny.fresh(jl.LoRA(2), tiny.params())


def test_the_latest_serves_every_task_that_has_come():
    state = init(FRESH)
    for k in range(3):
        trained = tiny.moved(start(jax.random.key(k), state), k)
        state = update(state, trained)
        assert int(state.count) == k + 1
        assert all(adapter(state, t) is trained for t in range(k + 1))
    with pytest.raises(IndexError, match="task 3: got 3 tasks so far"):
        adapter(state, 3)
    first = tiny.moved(FRESH, 0).trainable["first"]["b"]
    assert np.abs(np.asarray(state.latest.trainable["first"]["b"] - first)).max() > 0.01

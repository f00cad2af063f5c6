"""Rows of b are frozen on schedule, bitwise, under an optimizer that would go on moving them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.optimizers.gradual_freeze import gradual_freeze

PARAMS = {"w": {"core": jnp.ones((4, 4)), "b": jnp.ones((2, 4, 3))}}  # a stack of two, r = 4


def steps(solver, params, count):
    """[count + 1] trees: the start, and what is there after each step; the gradient is one."""
    state, out = solver.init(params), [params]
    for _ in range(count):
        updates, state = solver.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        out.append(params)
    return out


def test_the_first_rows_stop_by_hand_and_stay_bitwise():
    momentum = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    solver = optax.chain(momentum, gradual_freeze(6))
    seen = [np.asarray(p["w"]["b"]) for p in steps(solver, PARAMS, 8)]
    for n in range(8):
        moved = (seen[n + 1] != seen[n]).any(axis=(0, 2))
        stopped = min(4 * n // 6, 4)  # 0, 0, 1, 2, 2, 3, 4, 4
        assert moved.tolist() == [j >= stopped for j in range(4)], n


def test_other_arrays_are_left_alone():
    plain, frozen = optax.sgd(0.1), optax.chain(optax.sgd(0.1), gradual_freeze(2))
    a, b = steps(plain, PARAMS, 4)[-1], steps(frozen, PARAMS, 4)[-1]
    np.testing.assert_array_equal(a["w"]["core"], b["w"]["core"])
    assert (np.asarray(a["w"]["b"]) != np.asarray(b["w"]["b"])).all()


def test_refusals():
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1"):
        gradual_freeze(0)
    with pytest.raises(ValueError, match="name: got 'b', expected the name of an array"):
        gradual_freeze(3).init({"w": {"core": jnp.ones((2, 2))}})

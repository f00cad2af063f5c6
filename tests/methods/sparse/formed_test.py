"""The choice between a formed delta and one number at a time, and what narrow weights lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contract import Case
from jlora.contract.laws import _equations
from jlora.methods import SHiRA
from jlora.methods.sparse import formed

SHAPE = (4096, 4096)


def test_a_token_is_multiplied_and_a_batch_formed():
    few = 8 * (4096 + 4096)
    assert formed.entries_are_cheaper(few, 1, SHAPE)
    assert not formed.entries_are_cheaper(few, 4096, SHAPE)
    assert formed.entries_are_cheaper(few // 64, 4096, SHAPE)


@pytest.mark.parametrize(("rows", "most"), [(1, 3549), (64, 109), (10**9, 54)])
def test_the_bound_is_where_the_operations_are_equal(rows, most):
    """n = d_in d_out (T + 64) / (300 T), of a matrix of 128 x 128."""
    assert formed.entries_are_cheaper(most, rows, (128, 128))
    assert not formed.entries_are_cheaper(most + 1, rows, (128, 128))


def outputs(case, rows):
    """Shapes of all products of a step with so many tokens."""
    loss = lambda t, a, x: jnp.sum(case.forward(a.replace(trainable=t), x) ** 2)  # noqa: E731
    one = case.noisy[0]
    jaxpr = jax.make_jaxpr(jax.grad(loss))(one.trainable, one, case.x[:1, :rows])
    names = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    return {e.outvars[0].aval.shape[-2:] for e in names}


def test_one_token_has_no_dense_gradient():
    case = Case(SHiRA(rank=1))
    assert not outputs(case, 1) & {(8, 12), (12, 8)}
    assert outputs(case, 4) & {(8, 12), (12, 8)}


def check_narrow(bench):
    """Entries of 1e-4 in a weight of ones, which has no such digits in bfloat16."""
    adapter, signs = bench.noisy(SHiRA(rank=2), size=1e-4), np.resize([1.0, -1.0], (2, 12))
    p, delta = bench.numbers(adapter), np.zeros((12, 8))
    delta[p["rows"].astype(int), p["cols"].astype(int)] = p["c"]
    w, x = {"w": jnp.ones((12, 8), jnp.bfloat16)}, jnp.asarray(signs, jnp.bfloat16)
    want = signs @ delta  # the base's part is 0
    got = jl.lift(bench.model)(w, adapter, x)
    np.testing.assert_allclose(np.float64(got), want, atol=0.02 * np.abs(want).max())


def test_a_small_delta_is_not_rounded_into_a_narrow_weight(bench):
    check_narrow(bench)


def test_mutation_a_delta_in_the_weight_is_seen(bench, monkeypatch):
    merged = lambda method, x, w, p: x @ w.merged(method, p)  # noqa: E731
    monkeypatch.setattr(formed, "times_formed", merged)
    with pytest.raises(AssertionError):
        check_narrow(bench)

"""Trainable tokens: rows by numpy, a lookup that forms no table, and what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.selective.trainable_tokens import TrainableTokens

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)), jnp.float32)
IDS = jnp.asarray([[7, 0, 3], [3, 11, 2]], jnp.int32)
METHOD = TrainableTokens((3, 11))


def lookup(params, ids):
    return params["w"][ids]


def adapter(method=METHOD, noise=1.0):
    made = jl.init(jax.random.key(0), lookup, {"w": TABLE}, IDS, methods={"w": method})
    rows = made.trainable["w"]["rows"]
    return made.replace(trainable={"w": {"rows": rows + noise * jnp.arange(1.0, 9.0)[None, :]}})


def by_numpy():
    table = np.array(TABLE)
    for k in (3, 11):
        table[k] += np.arange(1.0, 9.0)
    return table[np.asarray(IDS)]


def check_value():
    a = adapter()
    np.testing.assert_allclose(jl.lift(lookup)({"w": TABLE}, a, IDS), by_numpy(), atol=1e-6)
    np.testing.assert_allclose(lookup(jl.merge({"w": TABLE}, a), IDS), by_numpy(), atol=1e-6)


def test_value():
    check_value()


def test_limit_fresh_rows_and_rows_nobody_looks_up_change_nothing():
    for a in (adapter(noise=0.0), adapter(TrainableTokens((1, 4)))):
        np.testing.assert_array_equal(jl.lift(lookup)({"w": TABLE}, a, IDS), TABLE[IDS])


def test_claim_only_the_rows_are_trained_and_no_table_is_formed():
    a = adapter()

    def loss(t):
        return jnp.sum(jl.lift(lookup)({"w": TABLE}, a.replace(trainable=t), IDS) ** 2)

    g = jax.grad(loss)(a.trainable)["w"]["rows"]
    want = 2 * np.asarray(jl.merge({"w": TABLE}, a)["w"])[[3, 11]]
    np.testing.assert_allclose(g[0], 2 * want[0], rtol=1e-5)  # looked up twice
    np.testing.assert_allclose(g[1], want[1], rtol=1e-5)
    text = str(jax.make_jaxpr(jax.grad(loss))(a.trainable))
    assert text.count("f32[12,8]") == 1  # the base itself


def test_a_tied_head_sees_the_rows_too():
    def tied(params, ids):
        return jnp.tanh(params["w"][ids]) @ params["w"].T

    a = adapter()
    got = jl.lift(tied)({"w": TABLE}, a, IDS)
    want = tied({"w": jl.merge({"w": TABLE}, a)["w"]}, IDS)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_refusals():
    for ids in ((), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="expected distinct rows"):
            TrainableTokens(ids)
    with pytest.raises(ValueError, match="w: id 12, expected one of 12 rows"):
        adapter(TrainableTokens((12,)))


def test_mutation_rows_in_another_order_are_seen(monkeypatch):
    good = TrainableTokens.apply

    def turned(self, x, w, p, ctx):
        return good(self, x, w, {**p, "rows": p["rows"][::-1]}, ctx)

    monkeypatch.setattr(TrainableTokens, "apply", turned)
    with pytest.raises(AssertionError):
        check_value()

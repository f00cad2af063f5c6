"""FlyLoRA's three selections: values, and which of them the bias can balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import bias_balanced
from jlora.routing.magnitudes import Magnitudes

RNG = np.random.default_rng(0)
SIZES = np.asarray([2.0, 1.5, 1.0, 1.0, 1.0, 0.6])
Y = jnp.asarray(RNG.normal(0, SIZES, size=(100, 6)), jnp.float32)
BIAS = jnp.asarray([-0.4, 0.0, 0.2, 0.5, 0.1, -0.2], jnp.float32)
SELECT = {
    "signed": lambda y, d: y + d,
    "magnitude": lambda y, d: np.abs(y) + d,
    "biased magnitude": lambda y, d: np.abs(y + d),
}


def check(select):
    routes, after = Magnitudes(2, select, 0.1)(Y, {"bias": BIAS}, True, None)
    by = SELECT[select](np.asarray(Y), np.asarray(BIAS))
    best = np.argsort(-by, axis=-1, kind="stable")[:, :2]
    np.testing.assert_array_equal(routes.ids, best)
    assert np.all(routes.weights == 1) and routes.balance == 0
    load = np.bincount(best.ravel(), minlength=6) / best.size
    want = np.asarray(BIAS) + 0.1 * np.sign(1 / 6 - load)
    np.testing.assert_allclose(after["bias"], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("select", SELECT)
def test_value_and_step(select):
    check(select)


def spread(select, steps=300):
    """(coefficient of variation of the load at first and at last, size of the bias)."""
    rule = Magnitudes(2, select, 0.01)

    def train(state, _):
        routes, state = rule(Y, state, True, None)
        return state, jnp.std(routes.load) / jnp.mean(routes.load)

    state, found = jax.jit(lambda s: jax.lax.scan(train, s, length=steps))(rule.init_state(6))
    return float(found[0]), float(found[-1]), float(jnp.abs(state["bias"]).max())


def test_which_selections_balance():
    for select in ("signed", "magnitude"):
        first, last, _ = spread(select)
        assert last < 0.25 * first, select
    first, last, size = spread("biased magnitude")
    assert last > 0.6 * first and size > 2.9  # the bias grows and grows


def test_magnitudes_keep_more_of_the_values():
    def kept(select):
        ids = np.asarray(Magnitudes(2, select).routes(Y, {"bias": 0 * BIAS}, True).ids)
        y = np.asarray(Y, np.float64)
        return (np.take_along_axis(y, ids, axis=-1) ** 2).sum() / (y**2).sum()

    assert kept("magnitude") > 0.7 > 0.55 > kept("signed")


def test_refusals():
    with pytest.raises(ValueError, match="select: got 'best', expected one of"):
        Magnitudes(select="best")
    with pytest.raises(ValueError, match=r"k: got 8, expected 1\.\.4"):
        Magnitudes(8).init_state(4)
    with pytest.raises(ValueError, match="rate: got -1"):
        Magnitudes(rate=-1)


def test_mutation_a_step_the_other_way_is_seen(monkeypatch):
    good = bias_balanced.stepped
    monkeypatch.setattr(bias_balanced, "stepped", lambda b, c, rate: good(b, c, -rate))
    with pytest.raises(AssertionError):
        check("signed")

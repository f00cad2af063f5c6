"""LoRA Composite and LoRA Switch: predictions averaged by hand, turns by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.compose.composite import SYSTEMS, composite, switch
from jlora.contracts import tiny
from jlora.contracts.composition import RATE, loop

PARAMS = tiny.params()
ADAPTERS = tiny.trained((jl.LoRA(2), jl.LoRA(1), jl.LoRA(2)), PARAMS)
Z, T = tiny.inputs(1)[0], jnp.float32(0.5)


def by_merging(k, z=Z, t=T):
    """The prediction of adapter k, by its merged weights in float64; of the base for None."""
    p = PARAMS if k is None else jl.merge(PARAMS, ADAPTERS[k])
    p, h = {name: np.float64(w) for name, w in p.items()}, np.float64(z)
    h = np.tanh(h @ p["first"] + float(t))
    for w in p["layers"]:
        h = np.tanh(h @ w)
    return h @ p["last"]


def check_value():
    each = np.stack([by_merging(k) for k in range(3)])
    bank, w = jl.stack(ADAPTERS), np.asarray([0.2, 0.5, 0.3], "f4")
    got = composite(tiny.model, PARAMS, bank, jnp.asarray(w), Z, T)
    np.testing.assert_allclose(got, np.tensordot(w, each, 1), atol=1e-5)
    w = np.asarray([0.7, -0.4, 0.0], "f4")
    got = composite(tiny.model, PARAMS, bank, jnp.asarray(w), Z, T)
    np.testing.assert_allclose(got, np.tensordot(w, each, 1) + 0.7 * by_merging(None), atol=1e-5)


def test_the_weighted_mean_of_predictions_by_numpy():
    check_value()


def test_equal_adapters_are_one_of_them():
    same = jl.stack([ADAPTERS[0]] * 3)
    got = composite(tiny.model, PARAMS, same, jnp.full(3, 1 / 3), Z, T)
    np.testing.assert_allclose(got, by_merging(0), atol=1e-5)


def test_turns_by_hand():
    want = [0, 0, 1, 1, 2, 2, 0]
    np.testing.assert_array_equal(switch(3, 7, stay=2), np.eye(3)[want])
    np.testing.assert_array_equal(switch(2, 3, stay=9), np.eye(2)[[0, 0, 0]])
    with pytest.raises(ValueError, match="stay: got 0, expected at least 1"):
        switch(2, 3, stay=0)


def test_a_step_of_switch_is_that_of_one_adapter():
    record = next(s for s in SYSTEMS if s.name == "LoRA Switch")
    got = loop(record, tiny.model, PARAMS, record.prepare(ADAPTERS), Z, record.weights(3, 4))
    z = np.float64(Z)
    for k, t in zip((0, 1, 2, 0), (1.0, 0.75, 0.5, 0.25), strict=True):
        z = z + RATE * by_merging(k, z, t)
    np.testing.assert_allclose(got, z, atol=1e-4)


def test_mutation_the_sum_of_deltas_is_another_prediction(monkeypatch):
    """Composition in the output is not composition in the weight."""

    def summed(model, params, bank, weights, z, t):
        total = jl.merging.merge("concat", bank, weights)
        return jl.lift(model)(params, total, z, t)

    monkeypatch.setitem(globals(), "composite", summed)
    with pytest.raises(AssertionError):
        check_value()


def test_another_number_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"weights: got shape \(2,\), expected \(3,\)"):
        composite(tiny.model, PARAMS, jl.stack(ADAPTERS), jnp.ones(2), Z, T)


def test_no_prediction_is_made_twice():
    """One trace of the model for the base, one for all adapters together."""
    traced = []

    def counting(p, z, t):
        traced.append(1)
        return tiny.model(p, z, t)

    jax.eval_shape(lambda w: composite(counting, PARAMS, jl.stack(ADAPTERS), w, Z, T), jnp.ones(3))
    assert len(traced) == 2

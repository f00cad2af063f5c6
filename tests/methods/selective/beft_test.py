"""BEFT: what is added to biases, by numpy in a scan, and what is no vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.selective.beft import BEFT, OutputBias


def model(params, x):
    return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"][None]), None), x, params)[0]


def case(method):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)  # noqa: E731
    params, x = {"w": draw(2, 4, 4), "b": draw(2, 4)}, draw(3, 4)
    return params, x, jl.init(jax.random.key(0), model, params, x, methods={"b": method})


def check_value(method):
    params, x, fresh = case(method)
    np.testing.assert_array_equal(jl.merge(params, fresh)["b"], params["b"])
    moved = fresh.replace(trainable=jax.tree.map(lambda t: t + 0.3, fresh.trainable))
    h = np.asarray(x, np.float64)
    for w, b in zip(np.asarray(params["w"]), np.asarray(params["b"]), strict=True):
        h = np.tanh(h @ w + (b + 0.3))
    np.testing.assert_allclose(jl.lift(model)(params, moved, x), h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model(jl.merge(params, moved), x), h, rtol=1e-4, atol=1e-5)


def test_value():
    check_value(BEFT())


class Replaced(BEFT):
    def merge(self, w, p):
        return p["v"][None, :]


def test_mutation_a_bias_that_is_replaced_is_seen():
    with pytest.raises(AssertionError):
        check_value(Replaced())


def test_a_matrix_is_refused_by_its_path():
    params, x, _ = case(BEFT())
    with pytest.raises(ValueError, match=r"w: BEFT trains vectors; got a matrix \[4, 4\]"):
        jl.init(jax.random.key(0), model, params, x, methods={"w": BEFT()})


def check_outputs(bench):
    adapter = bench.noisy(OutputBias())
    want = np.asarray(bench.x, np.float64) @ bench.w + bench.numbers(adapter)["bias"]
    np.testing.assert_allclose(bench.forward(adapter), want, atol=1e-4)


def test_without_a_bias_it_is_added_to_the_outputs(bench):
    check_outputs(bench)
    with pytest.raises(NotImplementedError, match="OutputBias has no merge"):
        jl.merge(bench.params, bench.fresh(OutputBias()))


def test_mutation_outputs_without_the_vector_are_seen(bench, monkeypatch):
    monkeypatch.setattr(OutputBias, "apply", lambda self, x, w, p, ctx: x @ w)
    with pytest.raises(AssertionError):
        check_outputs(bench)

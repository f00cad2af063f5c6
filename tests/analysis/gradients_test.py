"""Taps of the backward pass: plain gradients, layer by layer too, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.analysis import gradients as module
from jlora.analysis.gradients import gradients, layer_step, output_moments
from jlora.contracts import tiny

PARAMS = tiny.params()
TIME = jnp.asarray(0.5)
BATCHES = [(tiny.inputs(n, n), TIME) for n in (4, 2)]
SITES = list(jl.sites(tiny.model, PARAMS, *BATCHES[0]))


def loss(params, z, t):
    return jnp.sum(jnp.sin(tiny.model(params, z, t)))


def check_gradients(params, limit, want, tolerance=2e-5):
    got = [(g.site.path, g.index, g.value) for g in gradients(loss, params, BATCHES, SITES, limit)]
    assert [g[:2] for g in got] == [("first", 0), ("last", 0), ("layers", 0), ("layers", 1)]
    for path, index, value in got:
        expected = want[path][index] if path == "layers" else want[path]
        np.testing.assert_allclose(value, expected, atol=tolerance)


@pytest.fixture(scope="module")
def want():
    parts = [jax.grad(loss)(PARAMS, *batch) for batch in BATCHES]
    return jax.tree.map(lambda *t: np.sum(t, 0), *parts)


@pytest.mark.parametrize("limit", [2**30, 200])
def test_they_are_the_gradients(want, limit):
    """At once, and one site or one layer at a time."""
    check_gradients(PARAMS, limit, want)


def test_mutation_a_forgotten_batch_is_seen(want, monkeypatch):
    monkeypatch.setattr(module, "arguments", lambda batch: BATCHES[0])
    with pytest.raises(AssertionError):
        check_gradients(PARAMS, 2**30, want)


def test_a_quantised_base_has_gradients():
    """Which `jax.grad` by the codes has not."""
    packed = {**PARAMS, "first": jl.quantize(PARAMS["first"], 8, 6)}
    plain = {**PARAMS, "first": packed["first"].dequantize()}
    parts = [jax.grad(loss)(plain, *batch) for batch in BATCHES]
    check_gradients(packed, 2**30, jax.tree.map(lambda *t: np.sum(t, 0), *parts))


def test_one_layer_needs_the_memory_of_one_matrix():
    """XLA's own figures, of a stack of 24 layers: the whole gradient is 24 matrices."""
    layers, d = 24, 64

    def deep(params, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0])

    params = {"w": jax.ShapeDtypeStruct((layers, d, d), jnp.float32)}
    x, matrix = jax.ShapeDtypeStruct((2, d), jnp.float32), d * d * 4
    (site,) = jl.sites(deep, params, x)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    total = jax.ShapeDtypeStruct((d, d), jnp.float32)
    one = layer_step(deep, site).lower(total, params, index, (x,)).compile().memory_analysis()
    whole = jax.jit(jax.grad(deep)).lower(params, x).compile().memory_analysis()
    needs = one.temp_size_in_bytes + one.output_size_in_bytes
    assert needs < 6 * matrix
    assert whole.temp_size_in_bytes + whole.output_size_in_bytes >= layers * matrix


def test_second_moments_of_the_gradients_by_the_outputs():
    """Against gradients by zeros that are added to every output, layers unrolled."""

    def moved(eps, z, t):
        h = jnp.tanh(z @ PARAMS["first"] + eps["first"] + t)
        for k in range(2):
            h = jnp.tanh(h @ PARAMS["layers"][k] + eps[f"{k}"])
        return jnp.sum(jnp.sin(h @ PARAMS["last"] + eps["last"]))

    want = {}
    for z, t in BATCHES:
        sizes = {"first": 6, "0": 6, "1": 6, "last": 5}
        delta = jax.grad(moved)({k: jnp.zeros((*z.shape[:2], n)) for k, n in sizes.items()}, z, t)
        for k, d in delta.items():
            flat = np.asarray(d, "f8").reshape(-1, d.shape[-1])
            want[k] = want.get(k, 0) + flat.T @ flat
    got = output_moments(loss, PARAMS, BATCHES, SITES)
    np.testing.assert_allclose(got["first"], want["first"], atol=2e-5)
    np.testing.assert_allclose(got["layers"], np.stack([want["0"], want["1"]]), atol=2e-5)
    np.testing.assert_allclose(got["last"], want["last"], atol=2e-5)


def test_refusals():
    for limit in (2**30, 10):
        with pytest.raises(ValueError, match=r"\w+: got no data: no batches"):
            list(gradients(loss, PARAMS, [], SITES[2:], limit))
    with pytest.raises(TypeError, match="batches: got generator, expected a sequence"):
        next(gradients(loss, PARAMS, (b for b in BATCHES), SITES))
    bad = [(BATCHES[0][0].at[0, 0, 0].set(jnp.nan), TIME)]
    with pytest.raises(ValueError, match="first: got gradients that are not finite"):
        next(gradients(loss, PARAMS, bad, SITES))

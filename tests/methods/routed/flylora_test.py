"""FlyLoRA: the value of three selections, the sparse projection, merging, what is trained."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import flylora
from jlora.methods.routed.flylora import FlyLoRA
from jlora.routing.magnitudes import Select
from jlora.routing.state import advance

METHOD = FlyLoRA(rank=6, top_k=2, alpha=9.0)
BIAS = jnp.asarray(np.random.default_rng(5).normal(size=6) / 4, jnp.float32)


def moved(bench, method, seed=0):
    """A noisy adapter with a bias; A is that of seed 0."""
    adapter = bench.noisy(method).replace(trainable=bench.noisy(method, seed=seed).trainable)
    return adapter.replace(frozen={"w": {**adapter.frozen["w"], "bias": BIAS}})


def check(bench, method=METHOD):
    adapter = moved(bench, method)
    p = bench.numbers(adapter)
    x = np.asarray(bench.x, np.float64).reshape(-1, 12)
    z = x @ p["a"]
    by = {"signed": z + p["bias"], "magnitude": np.abs(z) + p["bias"]}
    by = by.get(method.select, np.abs(z + p["bias"]))
    active = np.zeros_like(z)
    np.put_along_axis(active, np.argsort(-by, axis=-1)[:, : method.top_k], 1.0, axis=-1)
    want = x @ bench.w + method.alpha / method.rank * (z * active) @ p["b"]
    np.testing.assert_allclose(
        np.reshape(bench.forward(adapter), (-1, 8)), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("select", get_args(Select))
def test_value(bench, select):
    check(bench, dataclasses.replace(METHOD, select=select))


def test_limit_all_ranks_are_lora_with_a_frozen_a(bench):
    adapter = bench.noisy(FlyLoRA(rank=4, top_k=4, alpha=8.0))
    p = bench.numbers(adapter)
    want = np.asarray(bench.x, np.float64) @ (bench.w + 2.0 * p["a"] @ p["b"])
    np.testing.assert_allclose(bench.forward(adapter), want, rtol=1e-4, atol=1e-4)
    assert adapter.trainable["w"].keys() == {"b"}


def test_the_projection_is_sparse_normal_and_that_of_the_key():
    site = jl.Site("w", (1024, 8), "io", np.dtype("float32"), ("dot",))
    method, context = FlyLoRA(rank=16, top_k=4), jl.InitContext(site, None, 0, {}, ())
    draw = lambda n: method.init(jax.random.key(n), site, context)[1]["a"]  # noqa: E731
    a, other = (np.asarray(draw(n), np.float64) for n in (0, 1))
    assert np.all((a != 0).sum(0) == 1024 * 4 // 16)
    np.testing.assert_allclose(a[a != 0].std(), 1 / 16, rtol=0.05)
    np.testing.assert_array_equal(a, draw(0))
    # adapters of different keys hardly meet
    assert np.abs(a.T @ other).mean() < 0.05 * np.diag(a.T @ a).mean()
    with pytest.raises(ValueError, match="expected at least one entry of A per rank"):
        small = jl.Site("w", (3, 8), "io", np.dtype("float32"), ("dot",))
        method.init(jax.random.key(0), small, context)


def test_the_mean_of_eight_is_their_mean_on_every_token(bench):
    parts = [moved(bench, METHOD, seed) for seed in range(8)]
    mean = jax.tree.map(lambda *t: sum(t) / 8, *[a.trainable for a in parts])
    got = bench.forward(parts[0].replace(trainable=mean))
    want = np.mean([np.asarray(bench.forward(a), np.float64) for a in parts], axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # of adapters that do not share A the mean of the arrays is something else
    other = [bench.noisy(METHOD, seed=s) for s in (0, 7)]
    mean = jax.tree.map(lambda s, t: (s + t) / 2, *other)
    want = np.mean([np.asarray(bench.forward(a)) for a in other], axis=0)
    assert np.abs(np.asarray(bench.forward(mean)) - want).max() > 0.05


def test_gradients_reach_x_through_a_unless_they_are_not_to(bench):
    def slope(method):
        adapter = moved(bench, method)
        run = lambda x: jnp.sum(jl.lift(bench.model)(bench.params, adapter, x) ** 2)  # noqa: E731
        y = bench.forward(adapter)
        return np.asarray(jax.grad(run)(bench.x) - 2 * y @ bench.params["w"].T)

    assert np.abs(slope(METHOD)).max() > 0.1
    np.testing.assert_allclose(slope(dataclasses.replace(METHOD, through_a=False)), 0, atol=1e-4)


def test_the_bias_moves_by_advance_alone(bench):
    adapter = moved(bench, METHOD)
    _, aux = bench.forward(adapter, aux=True)
    after = advance(adapter, aux)
    load = np.asarray(aux["w"]["counts"], np.float64) / 30
    step = METHOD.rate * np.sign(1 / 6 - load)
    np.testing.assert_allclose(after.frozen["w"]["bias"], BIAS + step, rtol=1e-5)
    assert after.trainable["w"]["b"] is adapter.trainable["w"]["b"]


def test_refusals():
    with pytest.raises(ValueError, match=r"FlyLoRA\.top_k: got 9, expected 1\.\.8"):
        FlyLoRA(rank=8, top_k=9)
    with pytest.raises(ValueError, match="select: got 'best'"):
        FlyLoRA(select="best")


def test_mutation_a_biased_value_path_is_seen(bench, monkeypatch):
    good = flylora.dense_weights
    monkeypatch.setattr(flylora, "dense_weights", lambda i, w, r: good(i, w, r) + BIAS[None, None])
    with pytest.raises(AssertionError):
        check(bench)

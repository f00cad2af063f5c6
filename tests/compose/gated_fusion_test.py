"""AutoLoRA's gates over the steps of a denoising loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.compose import gated_fusion as file
from jlora.compose.gated_fusion import TIMED, denoise, fuse, gated


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BASE, X = {"w": leaf(6, 5, seed=3)}, leaf(4, 6, seed=8)


def model(params, z, t):
    """It does not look at the time: only gates can tell the steps apart."""
    del t
    return z @ params["w"]


def adapter(seed):
    a = jl.init(jax.random.key(seed), lambda p, z: z @ p["w"], BASE, X, methods={"w": jl.LoRA(2)})
    return a.replace(trainable=jax.tree.map(lambda t: leaf(*t.shape, seed=seed), a.trainable))


ADAPTERS = [adapter(1), adapter(2)]


def check_value():
    p = {name: leaf(5, seed=i) for i, name in enumerate((*TIMED, "out"))}
    p["time"] = leaf(2, 4, 5, seed=9)
    y, parts = leaf(4, 5, seed=6), leaf(4, 3, 5, seed=7)

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    n = {k: np.asarray(t, "f8") for k, t in p.items()}
    a, b = norm(np.asarray(y, "f8"))[:, None], norm(np.asarray(parts, "f8"))
    for t in (0.0, 0.3, 1.0):
        moved = [np.cos(np.pi * t) * n["time"][0, c] + np.cos(2 * np.pi * t) * n["time"][1, c]
                 for c in range(4)]  # fmt: skip
        one, own, both, bias = (n[k] + m for k, m in zip(TIMED, moved, strict=True))
        g = 1 / (1 + np.exp(-(one * a + own * b + both * a * b + bias)))
        want = n["out"] * (g * np.asarray(parts)).sum(1)
        got = fuse(p, y, parts, jnp.ones(3), jnp.float32(t))
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_gate_at_a_time_by_numpy():
    check_value()


@pytest.mark.parametrize("order", [("own", "base", "both", "bias"), TIMED[::-1]])
def test_mutation_coefficients_in_another_order_are_seen(order, monkeypatch):
    monkeypatch.setattr(file, "TIMED", order)
    with pytest.raises(AssertionError):
        check_value()


def test_cosines_change_nothing_at_the_start():
    key, ones = jax.random.key(0), jnp.ones(2)
    without, fresh = (gated(key, ADAPTERS, cosines=k) for k in (0, 3))
    run = functools.partial(denoise, model, BASE)
    for t in (0.2, 0.9):
        got, want = (run(g, ones, X, jnp.float32(t)) for g in (fresh, without))
        np.testing.assert_array_equal(got, want)
    spoilt = fresh.replace(trainable={"w": {**fresh.trainable["w"], "time": leaf(3, 4, 5)}})
    one, other = (run(spoilt, ones, X, jnp.float32(t)) for t in (0.2, 0.9))
    assert np.abs(np.asarray(one - other)).max() > 0.05


def trained_loss(cosines):
    """Gates that are to open for the first adapter at t = 0 and for none at t = 1."""
    ones, times = jnp.ones(1), jnp.asarray([0.0, 1.0])
    start = gated(jax.random.key(0), ADAPTERS[:1], cosines=cosines)
    want = jnp.stack([X @ jl.merge(BASE, ADAPTERS[0])["w"], X @ BASE["w"]])
    rule = optax.adam(0.1)

    def loss(t):
        run = functools.partial(denoise, model, BASE, start.replace(trainable=t), ones, X)
        return jnp.mean((jax.vmap(run)(times) - want) ** 2)

    def step(carry, _):
        t, state = carry
        grads = jax.grad(loss)(t)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = rule.update(grads, state)
        return (optax.apply_updates(t, updates), state), None

    train = jax.jit(lambda t: loss(jax.lax.scan(step, (t, rule.init(t)), None, length=150)[0][0]))
    return float(train(start.trainable))


def test_gates_learn_which_step_an_adapter_is_for():
    assert trained_loss(1) < 0.05 * trained_loss(0)


def test_refusals():
    gates = gated(jax.random.key(0), ADAPTERS, cosines=1)
    tuned = jl.lift(model)
    with pytest.raises(ValueError, match=r"ctx\['time'\]: got nothing, expected a scalar"):
        tuned(BASE, gates, X, jnp.float32(0.5))
    with pytest.raises(ValueError, match=r"ctx\['time'\]: got shape \(4,\), expected a scalar"):
        tuned(BASE, gates, X, jnp.float32(0.5), ctx={"time": jnp.ones(4)})
    with pytest.raises(ValueError, match="cosines: got -1, expected at least 0"):
        gated(jax.random.key(0), ADAPTERS, cosines=-1)

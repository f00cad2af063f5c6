"""Flexora: gradients by central differences, weights by numpy, planted layers found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import flexora, ranks

RNG = np.random.default_rng(0)
X, V = (jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32) for _ in range(2))
PARAMS = {"layers": jnp.asarray(RNG.normal(size=(3, 4, 4)) / 2, jnp.float32)}
RATE = 0.3


def apply(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) + h, None), x, p["layers"])[0]


WANT = PARAMS["layers"].at[1].add(0.8 * jnp.outer(X[0], X[1]) / 2)  # only layer 1 has to change


def loss(adapter, x):
    target = apply({"layers": WANT.astype(x.dtype)}, x)
    params = {"layers": PARAMS["layers"].astype(x.dtype)}
    return jnp.mean((jl.lift(apply)(params, adapter, x) - target) ** 2)


@pytest.fixture(scope="module")
def adapter():
    a = jl.init(jax.random.key(0), apply, PARAMS, X, methods={"layers": jl.LoRA(2, 2.0)})
    draw = lambda t: jnp.asarray(RNG.normal(size=t.shape) / 3, t.dtype)  # noqa: E731
    return a.replace(trainable=jax.tree.map(draw, a.trainable))


LAYERS = {"layers": (0, 1, 2)}


def training(a):
    return loss(a, X.astype(a.trainable["layers"]["a"].dtype))


def validation(a):
    return loss(a, V.astype(a.trainable["layers"]["a"].dtype))


def by_differences(adapter, rate, step=1e-5):
    """The gradient of alpha by central differences of a step written out."""

    @jax.jit
    def after(alpha):
        w = 3 * jnp.exp(alpha) / jnp.exp(alpha).sum()
        frozen = {"layers": {"scale": adapter.frozen["layers"]["scale"] * w}}
        shown = adapter.replace(frozen=frozen)
        slopes = jax.grad(lambda t: training(shown.replace(trainable=t)))(adapter.trainable)
        moved = jax.tree.map(lambda t, g: t - rate * g, adapter.trainable, slopes)
        return validation(shown.replace(trainable=moved))

    eye = step * np.eye(3)
    return [float(after(ALPHA + e) - after(ALPHA - e)) / (2 * step) for e in eye]


ALPHA = np.asarray([0.3, -0.2, 0.5])


def check(adapter, unrolled):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda t: jnp.asarray(np.asarray(t, "f8")), adapter)
        found = unrolled(jnp.asarray(ALPHA), wide, LAYERS, training, validation, RATE)
        np.testing.assert_allclose(found, by_differences(wide, RATE), rtol=1e-5, atol=1e-9)
        first = flexora.first_order(jnp.asarray(ALPHA), wide, LAYERS, validation)
        np.testing.assert_allclose(first, by_differences(wide, 0.0), rtol=1e-5, atol=1e-9)
    return found, first


def test_both_gradients(adapter):
    found, first = check(adapter, flexora.unrolled)
    assert np.abs(found - first).max() > 0.05 * np.abs(found).max()


def test_mutation_the_first_order_is_not_the_unrolled_gradient(adapter):
    def short(alpha, adapter, layers, training, validation, rate):
        return flexora.first_order(alpha, adapter, layers, validation)

    with pytest.raises(AssertionError):
        check(adapter, short)


def test_weights_of_zero_logits_are_those_of_lora(adapter):
    alpha = jnp.asarray(ALPHA, jnp.float32)
    w = flexora.weights(alpha)
    np.testing.assert_allclose(w, 3 * np.exp(ALPHA) / np.exp(ALPHA).sum(), rtol=1e-5)
    same = flexora.weighted(adapter, jnp.zeros(3), LAYERS)
    np.testing.assert_array_equal(*(a.frozen["layers"]["scale"] for a in (same, adapter)))
    shown = jl.delta(PARAMS, flexora.weighted(adapter, alpha, LAYERS))["layers"]
    want = np.asarray(w)[:, None, None] * np.asarray(jl.delta(PARAMS, adapter)["layers"])
    np.testing.assert_allclose(shown, want, rtol=1e-4, atol=1e-5)


def test_the_layer_that_is_needed_is_found(adapter):
    """Alternating steps, either gradient; then the others of the stack stay zero."""
    fresh = jl.init(jax.random.key(0), apply, PARAMS, X, methods={"layers": jl.LoRA(2, 2.0)})
    rule = optax.adam(0.02)

    def run(kind):
        def step(carry, _):
            t, moments, state = carry
            a = fresh.replace(trainable=t)
            if kind == "unrolled":
                slope = flexora.unrolled(state.alpha, a, LAYERS, training, validation, RATE)
            else:
                slope = flexora.first_order(state.alpha, a, LAYERS, validation)
            state = flexora.advance(state, slope, 0.05)

            def seen(t):
                return training(flexora.weighted(a.replace(trainable=t), state.alpha, LAYERS))

            with jax.numpy_dtype_promotion("standard"):  # adam: float to an integer power
                updates, moments = rule.update(jax.grad(seen)(t), moments)
            return (optax.apply_updates(t, updates), moments, state), None

        begin = fresh.trainable, rule.init(fresh.trainable), flexora.search(LAYERS)
        return jax.lax.scan(step, begin, None, length=80)[0][2].alpha

    for kind in ("unrolled", "first order"):
        alpha = jax.jit(run, static_argnums=0)(kind)
        assert int(jnp.argmax(alpha)) == 1 and alpha[1] > 0, (kind, alpha)
    chosen = flexora.select(alpha, 1)
    masks = flexora.masks(fresh, chosen, LAYERS)
    small, _ = ranks.shrink(adapter, (), masks)
    moved = np.asarray(jl.delta(PARAMS, small)["layers"])
    assert not moved[[0, 2]].any() and moved[1].any()


def test_layers_by_stacks_and_by_numbers(adapter):
    assert flexora.layers_of(adapter) == LAYERS and flexora.count(LAYERS) == 3
    params = {
        "block_2": {"q": jnp.ones((4, 4)), "v": jnp.ones((4, 4))},
        "block_10": jnp.ones((4, 4)),
    }
    named = jl.init(
        jax.random.key(0), lambda p, x: x @ p["block_2"]["q"] @ p["block_2"]["v"] @ p["block_10"],
        params, X, methods={".*": jl.LoRA(2)},
    )  # fmt: skip
    assert flexora.layers_of(named) == {"block_2/q": 0, "block_2/v": 0, "block_10": 1}
    chosen = flexora.select(jnp.asarray([-1.0, 2.0]))
    small, _ = ranks.shrink(named, (), flexora.masks(named, chosen, flexora.layers_of(named)))
    assert [s.path for s, _ in small.sites] == ["block_10"]


def test_refusals(adapter):
    with pytest.raises(ValueError, match=r"k: got 4, expected in 1..3"):
        flexora.select(jnp.zeros(3), 4)
    plain = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, X,
                    methods={"w": jl.LoRA(2)})  # fmt: skip
    with pytest.raises(ValueError, match=r"w: got no stack and no number, expected a layer"):
        flexora.layers_of(plain)

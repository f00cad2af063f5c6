"""CoDyRA: thresholds by numpy, absorbing by numpy, a stream that keeps to few directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import codyra, sora
from jlora.schedules.codyra import Ramp

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
PARAMS = {"w": jnp.ones((6, 5)) / 3, "v": jnp.ones((6, 5)) / 4}
RAMP = Ramp(0.3, 2, 4)


def apply(p, x):
    return x @ p["w"], x @ p["v"]


@pytest.fixture(scope="module")
def fresh():
    lora = jl.init(jax.random.key(0), apply, PARAMS, X, methods={"w|v": jl.LoRA(4, 2.0)})
    return sora.gated(jax.random.key(1), lora)


def check_ramp(ramp):
    want = [0, 0, 0, 0.075, 0.15, 0.225, 0.3, 0.3]
    np.testing.assert_allclose([float(ramp.at(n)) for n in range(8)], want, rtol=1e-6)


def test_the_ramp():
    check_ramp(RAMP)
    assert [float(Ramp(0.3, 2, 0).at(n)) for n in (1, 2)] == [0, pytest.approx(0.3)]


def test_mutation_a_ramp_without_its_dense_part_is_seen():
    with pytest.raises(AssertionError):
        check_ramp(Ramp(0.3, 0, 4))


def test_the_threshold_is_raw_and_comes_after_the_step(fresh):
    """Adam's step first, whatever its size, then kappa of the step by numpy."""
    rng = np.random.default_rng(3)
    draw = lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    rule = optax.chain(optax.adam(0.1), codyra.proximal(RAMP))
    plain, t = optax.adam(0.1), fresh.trainable
    state, other = rule.init(t), plain.init(t)
    for number in range(5):
        g = jax.tree.map(draw, t)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            (u, state), (step, other) = rule.update(g, state, t), plain.update(g, other, t)
        gate = np.asarray(t["w"]["e"] + step["w"]["e"], "f8")
        kappa = 0.3 * np.clip((number - 2) / 4, 0, 1)
        want = np.sign(gate) * np.maximum(np.abs(gate) - kappa, 0)
        t = optax.apply_updates(t, u)
        np.testing.assert_allclose(t["w"]["e"], want, rtol=1e-4, atol=1e-6)


def test_absorbing_keeps_the_function_and_drops_what_is_closed(fresh):
    rng = np.random.default_rng(4)
    t = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), fresh.trainable)
    t["w"]["e"], t["v"]["e"] = t["w"]["e"].at[1:3].set(0), jnp.zeros(4)
    adapter = fresh.replace(trainable=t)
    after = codyra.absorb(PARAMS, adapter)
    own = {n: np.asarray(x, "f8") for n, x in t["w"].items()}
    want = 1 / 3 + 0.5 * sum(own["e"][k] * np.outer(own["a"][:, k], own["b"][k]) for k in (0, 3))
    np.testing.assert_allclose(after["w"], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after["v"], PARAMS["v"])
    for y, z in zip(apply(after, X), jl.lift(apply)(PARAMS, adapter, X), strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    none = jax.tree.map(jnp.zeros_like, t)
    assert codyra.absorb(PARAMS, fresh.replace(trainable=none)) is PARAMS


def test_a_larger_kappa_leaves_fewer_ranks_most_where_they_are_needed(fresh):
    """A task of rank 1 at one of two sites."""
    rng = np.random.default_rng(5)
    target = jnp.asarray(np.outer(rng.normal(size=6), rng.normal(size=5)), jnp.float32)

    def task(kappa):
        def loss(t):
            change = jl.delta(PARAMS, fresh.replace(trainable=t))
            return jnp.sum((change["w"] - target) ** 2) + jnp.sum(change["v"] ** 2)

        def step(carry, n):
            t, state = carry
            with jax.numpy_dtype_promotion("standard"):
                u, state = optax.adam(0.03).update(jax.grad(loss)(t), state)
            t = optax.apply_updates(t, u)
            cut = sora.soft_threshold
            t = {p: {**own, "e": cut(own["e"], kappa * Ramp(1.0, 40, 10).at(n))}
                 for p, own in t.items()}  # fmt: skip
            return (t, state), None

        begin = fresh.trainable, optax.adam(0.03).init(fresh.trainable)
        return jax.lax.scan(step, begin, jnp.arange(150))[0][0]

    many = jax.jit(jax.vmap(task))(jnp.asarray([0.0, 0.02, 0.035]))
    left = [[int((t["e"][k] != 0).sum()) for t in (many["w"], many["v"])] for k in range(3)]
    assert sum(left[0]) == 8 > sum(left[1]) > sum(left[2]) > 0, left
    assert left[1][0] >= left[1][1], left  # the site that the task needs keeps more


def test_refusals():
    with pytest.raises(ValueError, match=r"Ramp: got .*expected numbers >= 0"):
        Ramp(-1.0)

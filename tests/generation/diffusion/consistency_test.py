"""Consistency distillation: the loss by numpy, the boundary, and a Gaussian whose student is known.

Data N(MEAN, SPREAD^2): the path from noise to data keeps the standard score of a sample, so that
the exact consistency function is affine and one step of it draws the right law, while one step of
the exact denoiser draws the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.generation.diffusion import consistency, paths
from jlora.generation.diffusion.consistency import Distillation, boundary, consistency_loss, jump

FLOW = paths.rectified_flow()
PLAN = Distillation(FLOW)
MEAN, SPREAD = 0.7, 0.5


def velocity(z, t):
    """The exact velocity of the Gaussian under the flow."""
    alpha, sigma = FLOW(t)
    gain = SPREAD**2 * alpha / ((SPREAD * alpha) ** 2 + sigma**2)
    x0 = MEAN + gain * (z - alpha * MEAN)
    noise = (sigma / ((SPREAD * alpha) ** 2 + sigma**2)) * (z - alpha * MEAN)
    return noise - x0


def exact(z, t):
    """The exact consistency function."""
    alpha, sigma = FLOW(t)
    return MEAN + SPREAD * (z - alpha * MEAN) / jnp.sqrt((SPREAD * alpha) ** 2 + sigma**2)


def linear(params, z, t, cond):
    return params["a"] * z + params["b"] * t + cond


def guided(z, t, cond, scale):
    return (0.3 - scale * t) * z + cond


def data(count=6, shape=(2, 3)):
    rng = np.random.default_rng(0)
    x, cond = rng.normal(size=(count, *shape)), rng.normal(size=(count, *shape))
    return jnp.asarray(x, jnp.float32), jnp.asarray(cond, jnp.float32)


PARAMS = {"a": jnp.float32(0.4), "b": jnp.float32(-0.2)}
TARGET = {"a": jnp.float32(0.1), "b": jnp.float32(0.5)}


def check_loss(plan):
    """The loss of the module's docstring for a flow, by numpy in float64."""
    x, cond = data()
    value, got = consistency_loss(
        linear, guided, PARAMS, TARGET, jax.random.key(3), x, cond, plan, (2.0, 4.0)
    )
    wide = lambda a: np.asarray(a, np.float64)[:, None, None]  # noqa: E731
    z, c, w = np.asarray(got.z, np.float64), np.asarray(cond), wide(got.scales)
    number = np.round(np.asarray(got.t) * plan.steps)
    np.testing.assert_allclose(got.t, number / plan.steps, rtol=1e-6)
    assert 2 <= w.min() and w.max() <= 4 and np.ptp(w) > 0 and np.ptp(number) > 0
    t, s = wide(number / plan.steps), wide((number - 1) / plan.steps)
    noise = (z - (1 - t) * np.asarray(x)) / t
    assert abs(noise.std() - 1) < 0.4
    ahead = z + (s - t) * ((0.3 - w * t) * z + c)  # Euler's step of the flow
    np.testing.assert_allclose(got.ahead, ahead, atol=1e-5)

    def f(params, z, t):
        u = params["a"] * z + params["b"] * t + c
        moved = 10 * 1000 * t
        skip, out = 0.25 / (moved**2 + 0.25), moved / np.sqrt(moved**2 + 0.25)
        return skip * z + out * (z - t * u)

    gap = f(jax.tree.map(float, PARAMS), z, t) - f(jax.tree.map(float, TARGET), ahead, s)
    if plan.distance == "l2":
        expected = (gap**2).mean((1, 2))
    else:
        expected = (np.sqrt(gap**2 + plan.huber**2) - plan.huber).mean((1, 2))
    np.testing.assert_allclose(got.losses, expected, rtol=1e-4)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", consistency.DISTANCES)
def test_loss_by_numpy(name):
    check_loss(Distillation(FLOW, distance=name, huber=0.05, steps=10))


@pytest.mark.parametrize("broken", ["solver_step", "jump", "distance"])
def test_mutation_a_wrong_piece_is_seen(monkeypatch, broken):
    right = getattr(consistency, broken)
    monkeypatch.setattr(consistency, broken, lambda *a: right(*a) * 1.01)
    with pytest.raises(AssertionError):
        check_loss(Distillation(FLOW, steps=10))


def test_boundary_by_numpy_is_the_identity_at_zero():
    skip, out = boundary(jnp.zeros(()))
    assert float(skip) == 1.0 and float(out) == 0.0
    steps = np.asarray([0.5, 1, 20, 999])  # the script's integers, and between the first of them
    skip, out = boundary(jnp.asarray(steps / 1000, jnp.float32))
    np.testing.assert_allclose(skip, 0.25 / ((steps / 0.1) ** 2 + 0.25), rtol=1e-5)
    np.testing.assert_allclose(out, (steps / 0.1) / np.sqrt((steps / 0.1) ** 2 + 0.25), rtol=1e-5)
    z, anything = data()
    np.testing.assert_array_equal(jump(PLAN, anything, z, jnp.float32(0.0)), z)


def test_the_target_has_no_gradient():
    x, cond = data()

    def value(params, target):
        return consistency_loss(
            linear, guided, params, target, jax.random.key(0), x, cond, PLAN, (2.0, 2.0)
        )[0]

    mine, other = jax.jit(jax.grad(value, (0, 1)))(PARAMS, PARAMS)
    assert all(float(g) == 0.0 for g in jax.tree.leaves(other))
    assert all(float(g) != 0.0 for g in jax.tree.leaves(mine))


def gaussian_loss(student, plan):
    """Loss of one function as student and target on the Gaussian."""
    x = MEAN + SPREAD * jax.random.normal(jax.random.key(1), (4096,))
    model = lambda params, z, t, cond: student(z, t)  # noqa: E731
    teacher = lambda z, t, cond, scale: velocity(z, t)  # noqa: E731
    return float(
        consistency_loss(model, teacher, {}, {}, jax.random.key(2), x, jnp.zeros(4096), plan)[0]
    )


def test_the_exact_student_has_the_loss_of_the_solver_alone():
    """It falls as 1 / N^2 per unit of the path, and that of the denoiser does not vanish so."""
    plans = [Distillation(FLOW, steps=n) for n in (20, 80)]

    def student(z, t):  # the velocity whose jump is the exact function
        return jnp.where(t > 0, (z - exact(z, t)) / jnp.maximum(t, 1e-6), 0.0)

    mine = [gaussian_loss(student, p) for p in plans]
    theirs = [gaussian_loss(velocity, p) for p in plans]
    assert mine[1] < mine[0] / 40  # local error of Euler: N^-2 squared is 256
    assert mine[1] < 0.01 * theirs[1]


def test_distillation_reaches_the_consistency_function():
    """A table of affine students; before, one step says the mean; after, it draws the law."""
    plan = Distillation(FLOW, steps=16)
    number = lambda t: jnp.round(t * plan.steps).astype(jnp.int32)  # noqa: E731

    def student(params, z, t, cond):  # the velocity of the exact denoiser, plus what is learned
        return velocity(z, t) + params[number(t), 0] * z + params[number(t), 1]

    teacher = lambda z, t, cond, scale: velocity(z, t)  # noqa: E731
    rule = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    start = jnp.zeros((plan.steps + 1, 2))

    def step(carry, key):
        params, state = carry
        x = MEAN + SPREAD * jax.random.normal(key, (128,))
        grads = jax.grad(
            lambda p: consistency_loss(
                student, teacher, p, params, key, x, jnp.zeros(128), plan
            )[0]
        )(params)  # fmt: skip
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(grads, state)
        return (params + updates, state), None

    keys = jax.random.split(jax.random.key(0), 400)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((start, rule.init(start)))
    z, one = jax.random.normal(jax.random.key(9), (4096,)), jnp.float32(1.0)
    before, after = (jump(plan, student(p, z, one, None), z, one) for p in (start, params))
    assert float(before.std()) < 0.01
    assert abs(float(after.std()) - SPREAD) < 0.1 and abs(float(after.mean()) - MEAN) < 0.05


@pytest.mark.parametrize(
    "fields, message",
    [({"distance": "l1"}, "distance: got 'l1', expected one of"),
     ({"steps": 0}, "got steps=0"), ({"huber": 0.0}, "huber=0.0"),
     ({"kind": "score"}, "prediction kind: got 'score'")],
)  # fmt: skip
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Distillation(FLOW, **fields)


def test_scales_out_of_order_are_an_error():
    x, cond = data()
    with pytest.raises(ValueError, match="expected the least one first"):
        consistency_loss(
            linear, guided, PARAMS, PARAMS, jax.random.key(0), x, cond, PLAN, (3.0, 2.0)
        )

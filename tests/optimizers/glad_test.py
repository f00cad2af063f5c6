"""GLAD: both forms against numpy on quadratic losses, their limits, and the flatter basin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.optimizers.glad import dot, glad, norm, sharpness

DRAW = np.random.default_rng(0)
SIDE = DRAW.normal(size=(6, 6))
H = (SIDE @ SIDE.T + np.eye(6)).astype(np.float32)
POINT, TARGET = DRAW.normal(size=(2, 6)).astype(np.float32)
TREE = {"site": {"a": jnp.asarray(POINT[:4].reshape(2, 2)), "b": jnp.asarray(POINT[4:])}}


def flat_of(tree):
    return jnp.concatenate([tree["site"]["a"].reshape(-1), tree["site"]["b"]])


def quadratic(tree, target=TARGET):
    x = flat_of(tree)
    return 0.5 * x @ jnp.asarray(H) @ x - jnp.asarray(target) @ x


def general(tree):
    return quadratic(tree, 3 * POINT @ H)


def test_flat_is_the_gradient_at_the_radius():
    g = H @ POINT - TARGET
    found = jax.jit(lambda t: glad(quadratic, t, rho=0.3, alpha=0.7))(TREE)
    want = g + 0.7 * 0.3 * H @ g / np.linalg.norm(g)
    np.testing.assert_allclose(flat_of(found.grads), want, rtol=1e-5)
    np.testing.assert_allclose(found.value, 0.5 * POINT @ H @ POINT - TARGET @ POINT, rtol=1e-5)
    cosine = want @ g / np.linalg.norm(want) / np.linalg.norm(g)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-5)
    down = g - 0.7 * 0.3 * H @ g / np.linalg.norm(g)
    assert np.abs(down - flat_of(found.grads)).max() > 0.1, "mutation: the step goes down"


def test_without_a_share_it_is_the_plain_gradient_and_zero_stays_zero():
    plain = jax.grad(quadratic)(TREE)
    found = glad(quadratic, TREE, alpha=0.0)
    np.testing.assert_array_equal(flat_of(found.grads), flat_of(plain))
    assert float(found.cosine) == pytest.approx(1.0)
    still = glad(lambda t: 0.0 * quadratic(t), TREE)
    assert float(norm(still.grads)) == 0.0 and float(still.cosine) == 0.0


def test_agreeing_takes_away_what_works_against_the_general_loss():
    g, h = H @ POINT - TARGET, H @ POINT - 3 * H @ POINT
    assert g @ h < 0, "the losses disagree"
    found = flat_of(glad(quadratic, TREE, "agreeing", general=general).grads)
    np.testing.assert_allclose(found, g - (g @ h) / (h @ h) * h, rtol=1e-4, atol=1e-5)
    assert abs(np.asarray(found) @ h) < 1e-3 * np.linalg.norm(g) * np.linalg.norm(h)
    assert np.asarray(found) @ g > 0
    same = glad(quadratic, TREE, "agreeing", general=lambda t: 2 * quadratic(t)).grads
    np.testing.assert_allclose(flat_of(same), g, rtol=1e-6)
    none = glad(quadratic, TREE, "agreeing", general=lambda t: 0 * quadratic(t)).grads
    np.testing.assert_allclose(flat_of(none), g, rtol=1e-6)


def test_among_factors_of_one_delta_it_ends_at_the_flattest():
    """a b = 1 everywhere on a curve of minima, whose curvature a^2 + b^2 is least at a = b."""

    def loss(t):
        return 0.5 * (t["a"] * t["b"] - 1) ** 2

    @jax.jit
    def descend(alpha):
        def step(t, _):
            plain, flat = (glad(loss, t, rho=0.2, alpha=x).grads for x in (0.0, 1.0))
            g = jax.tree.map(lambda x, y: (1 - alpha) * x + alpha * y, plain, flat)
            return jax.tree.map(lambda x, d: x - 0.05 * d, t, g), None

        start = {"a": jnp.float32(2.5), "b": jnp.float32(0.5)}
        return jax.lax.scan(step, start, None, length=3000)[0]

    sharp, smooth = descend(jnp.float32(0)), descend(jnp.float32(1))
    curvature = [float(t["a"] ** 2 + t["b"] ** 2) for t in (sharp, smooth)]
    assert curvature[0] > 5.5 and curvature[1] < 2.3 and float(loss(smooth)) < 0.02
    key = jax.random.key(0)
    rise = [float(sharpness(key, loss, t, 0.01, 64)) for t in (sharp, smooth)]
    want = 0.5 * 0.01**2 * curvature[0] / 2  # the mean over directions in the plane
    np.testing.assert_allclose(rise[0], want, rtol=0.3)


def test_products_are_over_all_arrays():
    assert float(dot(TREE, TREE)) == pytest.approx(float(POINT @ POINT), rel=1e-5)
    assert float(norm(TREE)) == pytest.approx(float(np.linalg.norm(POINT)), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"form": "sharp"}, "form: got 'sharp'"),
        ({"rho": 0.0}, "rho: got 0.0"),
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"form": "agreeing"}, "general: got none for form 'agreeing'"),
        ({"general": general}, "general: got one for form 'flat'"),
    ],
)
def test_what_cannot_work_is_an_error(given, said):
    with pytest.raises(ValueError, match=said):
        glad(quadratic, TREE, **given)


def test_sharpness_needs_a_direction():
    with pytest.raises(ValueError, match=r"got 0\.1, 0, expected"):
        sharpness(jax.random.key(0), quadratic, TREE, 0.1, 0)

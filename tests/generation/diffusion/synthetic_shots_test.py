"""DataDream: the loss of real and synthetic pictures, and what the generator is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.generation.diffusion.synthetic_shots import balanced, mixture

RNG = np.random.default_rng(0)
REAL, SYNTHETIC = RNG.normal(size=(3, 4)), RNG.normal(size=(6, 4))
LABELS, OTHER = np.asarray([0, 1, 3], np.int32), np.asarray([2, 2, 0, 1, 3, 3], np.int32)


def cross(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))


def check_value(loss):
    """Value, and gradient by the logits, against the equation in float64."""

    def total(real, synthetic):
        return loss(cross(real, LABELS), cross(synthetic, OTHER), 0.8)

    given = jnp.asarray(REAL, jnp.float32), jnp.asarray(SYNTHETIC, jnp.float32)
    value, slopes = jax.value_and_grad(total, (0, 1))(*given)
    want = 0.0
    for x, y, share, slope in zip((REAL, SYNTHETIC), (LABELS, OTHER), (0.8, 0.2), slopes,
                                  strict=True):  # fmt: skip
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        want -= share * np.log(p[np.arange(len(y)), y]).mean()
        p[np.arange(len(y)), y] -= 1
        np.testing.assert_allclose(slope, share * p / len(y), atol=1e-6)
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_the_loss_by_numpy():
    check_value(mixture)


@pytest.mark.parametrize("wrong", [
    lambda real, synthetic, share: mixture(synthetic, real, share),
    lambda real, synthetic, share: jnp.mean(jnp.concatenate([real, synthetic])),
    lambda real, synthetic, share: share * jnp.mean(real) + share * jnp.mean(synthetic),
])  # fmt: skip
def test_mutations_are_seen(wrong):
    with pytest.raises(AssertionError):
        check_value(wrong)


def test_a_share_of_one_leaves_the_synthetic_pictures_out():
    real = jnp.asarray([1.0, 2.0])
    assert float(mixture(real, jnp.asarray([50.0]), 1.0)) == 1.5
    assert float(mixture(real, jnp.asarray([50.0]), 0.0)) == 50.0


def test_every_prompt_of_a_class_comes_before_any_comes_again():
    labels = np.asarray([0, 1, 0, 0, 2, 1])
    chosen = balanced(jax.random.key(0), labels, 3, 4)
    np.testing.assert_array_equal(labels[chosen], np.repeat([0, 1, 2], 4))
    assert set(chosen[:3]) == {0, 2, 3} and set(chosen[4:6]) == {1, 5} == set(chosen[6:8])
    np.testing.assert_array_equal(chosen, balanced(jax.random.key(0), labels, 3, 4))
    draws = {tuple(balanced(jax.random.key(k), labels, 3, 1)) for k in range(8)}
    assert len(draws) > 1  # another key is another choice


def test_refusals():
    with pytest.raises(ValueError, match="labels: got no prompt of class 1, expected at least one"):
        balanced(jax.random.key(0), np.asarray([0, 2]), 3, 1)
    with pytest.raises(ValueError, match="labels: got 0 to 3, expected 0 to 2"):
        balanced(jax.random.key(0), np.asarray([0, 3]), 3, 1)
    with pytest.raises(ValueError, match="each: got 0, expected at least 1"):
        balanced(jax.random.key(0), np.asarray([0]), 1, 0)
    with pytest.raises(ValueError, match=r"share: got 1\.5, expected 0 to 1"):
        mixture(jnp.ones(2), jnp.ones(2), 1.5)

"""The discriminator: its optimum by numpy, what it keeps, and that both classes weigh the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.transfer.discriminator import accept, fit, log_odds

D, PENALTY = 3, 0.05


def rows(seed, n, shift):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, D)) * [1.0, 2.0, 0.5] + [shift, 0.0, 1.0], jnp.float32)


@pytest.fixture(scope="module")
def trained():
    """Real texts lie 1.5 to the right; four times as many were written."""
    real, written = rows(0, 10, 1.5), rows(1, 40, 0.0)
    found = jax.jit(functools.partial(fit, penalty=PENALTY))(real, written)
    return found, np.asarray(real, "f8"), np.asarray(written, "f8")


def oracle(real, written, weight, bias, at):
    """Log-odds of rows `at`, and the gradient of the docstring's objective, float64."""
    both = np.concatenate([real, written])
    scaled = lambda x: (x - both.mean(0)) / both.std(0)  # noqa: E731
    odds = lambda x: scaled(x) @ weight + bias  # noqa: E731
    sigmoid = lambda t: 1 / (1 + np.exp(-t))  # noqa: E731
    on_real, on_written = -sigmoid(-odds(real)), sigmoid(odds(written))  # d loss / d odds
    by_weight = on_real @ scaled(real) / len(real) + on_written @ scaled(written) / len(written)
    by_bias = (on_real.mean() + on_written.mean()) / 2
    return odds(at), np.append(by_weight / 2 + PENALTY * weight, by_bias)


def test_it_is_the_optimum_and_its_odds_are_those_of_the_equation(trained):
    found, real, written = trained
    weight, bias = np.asarray(found.weight, "f8"), float(found.bias)
    odds, gradient = oracle(real, written, weight, bias, real)
    np.testing.assert_allclose(log_odds(found, jnp.asarray(real, jnp.float32)), odds, atol=1e-4)
    assert np.abs(gradient).max() < 1e-4
    assert np.abs(oracle(real, written, 0.9 * weight, bias, real)[1]).max() > 1e-3  # another one


def test_both_classes_weigh_the_same(trained):
    """Written rows repeated change nothing; at even odds the bias does not know their number."""
    found, real, written = trained
    _, gradient = oracle(real, np.tile(written, (3, 1)), np.zeros(D), 0.0, real)
    assert abs(gradient[-1]) < 1e-12
    x = jnp.asarray(np.concatenate([real, written]), jnp.float32)
    right = np.asarray(log_odds(found, x) > 0) == (np.arange(len(x)) < len(real))
    assert right[: len(real)].mean() > 0.6 and right[len(real) :].mean() > 0.6


def test_the_most_likely_texts_are_kept(trained):
    found, _, _ = trained
    near, far = rows(2, 20, 1.5), rows(3, 60, 0.0)
    odds = log_odds(found, jnp.concatenate([far, near]))
    kept = np.asarray(accept(odds, 20))
    assert kept.dtype == np.int32
    assert (kept == np.argsort(-np.asarray(odds), kind="stable")[:20]).all()
    assert (kept >= 60).mean() > 2 * 0.25  # a quarter by chance
    mixed = jax.random.permutation(jax.random.key(0), odds)  # mutation: the odds of other texts
    assert (np.asarray(accept(mixed, 20)) >= 60).mean() < 0.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit(jnp.ones((2, 3)), jnp.ones((2, 4))), r"real \(2, 3\) and written \(2, 4\)"),
        (lambda: fit(jnp.ones((0, 3)), jnp.ones((2, 3))), "got 0 real and 2 written rows"),
        (lambda: fit(jnp.ones((2, 3)), jnp.ones((2, 3)), penalty=0.0), "penalty: got 0.0"),
        (lambda: accept(jnp.ones(3), 4), "keep: got 4, expected 1 to 3 written texts"),
        (lambda: accept(jnp.ones(3), 0), "keep: got 0"),
    ],
)
def test_what_cannot_be_is_an_error(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_embeddings_of_another_base_are_an_error(trained):
    with pytest.raises(ValueError, match=r"got embeddings \(2, 4\), expected \[..., 3\]"):
        log_odds(trained[0], jnp.ones((2, 4)))

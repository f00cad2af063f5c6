"""Kernel ridge: numpy oracle, closed form against refits, limits, selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.baselines import ridge, soup

RNG = np.random.default_rng(0)
GROUPS = np.asarray([0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6])
X = (RNG.normal(size=(7, 5))[GROUPS] + 0.1 * RNG.normal(size=(12, 5))).astype("f4")
Y = (np.sin(X @ RNG.normal(size=(5, 9))) + 2.0).astype("f4")
Q = RNG.normal(size=(4, 5)).astype("f4")
KERNELS = (ridge.Kernel("linear"), ridge.Kernel("cosine"), ridge.Kernel("rbf", 1.7))


def numpy_kernel(kernel, x, y):
    if kernel.kind == "linear":
        return x @ y.T
    if kernel.kind == "cosine":
        return x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)[None]
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 2 / kernel.width**2)


def numpy_ridge(kernel, x, y, q, penalty):
    """Solves the bordered system [[K + lambda I, 1], [1^T, 0]] [alpha; b] = [Y; 0]."""
    x, y, q = (z.astype(np.float64) for z in (x, y, q))
    n = len(x)
    system = np.block(
        [
            [numpy_kernel(kernel, x, x) + penalty * np.eye(n), np.ones((n, 1))],
            [np.ones((1, n)), np.zeros((1, 1))],
        ]
    )
    solution = np.linalg.solve(system, np.vstack([y, np.zeros((1, y.shape[1]))]))
    return numpy_kernel(kernel, q, x) @ solution[:-1] + solution[-1]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.kind)
def test_prediction_and_leave_one_task_out_match_a_refit_loop(kernel):
    penalty = 0.3
    state = jax.jit(ridge.fit, static_argnums=0)(kernel, jnp.asarray(X), penalty)
    predict = jax.jit(ridge.predict, static_argnums=0)
    got = predict(kernel, state, {"y": jnp.asarray(Y)}, jnp.asarray(Q))["y"]
    np.testing.assert_allclose(got, numpy_ridge(kernel, X, Y, Q, penalty), atol=2e-4)

    weights = ridge.leave_out_weights(state, jnp.asarray(GROUPS))
    same = GROUPS[:, None] == GROUPS[None]
    np.testing.assert_allclose(np.asarray(weights)[same], 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-4)
    closed = soup.combine(weights, jnp.asarray(Y))
    for task in range(7):
        out = GROUPS == task
        refit = numpy_ridge(kernel, X[~out], Y[~out], X[out], penalty)
        np.testing.assert_allclose(np.asarray(closed)[out], refit, atol=1e-3)

    # Mutation: leaving out single rows instead of whole tasks is a different, leaking answer.
    leaky = soup.combine(ridge.leave_out_weights(state, jnp.arange(12)), jnp.asarray(Y))
    assert np.abs(np.asarray(leaky - closed)).max() > 0.05


def test_small_penalty_interpolates_and_large_penalty_is_the_mean():
    kernel = ridge.Kernel("rbf", 1.0)
    for penalty, want in ((1e-5, Y), (1e6, np.broadcast_to(Y.mean(0), Y.shape))):
        state = ridge.fit(kernel, jnp.asarray(X), penalty)
        got = ridge.predict(kernel, state, jnp.asarray(Y), jnp.asarray(X))
        np.testing.assert_allclose(got, want, atol=5e-3)


def test_choose_reports_the_brute_force_error_and_prefers_what_generated_the_data():
    x = RNG.normal(size=(20, 3)).astype("f4")
    linear = x @ RNG.normal(size=(3, 6)).astype("f4")
    choice = ridge.choose(
        jnp.asarray(x), jnp.asarray(linear @ linear.T), jnp.arange(20), penalties=(1e-3, 1.0)
    )
    assert choice.kernel.kind == "linear" and choice.error < 1e-3
    for kernel, penalty, error in choice.tried[::3]:
        residual = [
            linear[i]
            - numpy_ridge(
                kernel, np.delete(x, i, 0), np.delete(linear, i, 0), x[i : i + 1], penalty
            )[0]
            for i in range(20)
        ]
        brute = (np.square(residual)).sum() / ((linear - linear.mean(0)) ** 2).sum()
        np.testing.assert_allclose(error, brute, rtol=2e-2, atol=1e-5)


def test_choose_shrinks_to_the_mean_when_conditions_say_nothing():
    noise = RNG.normal(size=(20, 30)).astype("f4")
    x = RNG.normal(size=(20, 3)).astype("f4")
    choice = ridge.choose(jnp.asarray(x), jnp.asarray(noise @ noise.T), jnp.arange(20))
    assert choice.error > 0.95


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="'poly'"):
        ridge.Kernel("poly")
    with pytest.raises(ValueError, match="width 0"):
        ridge.Kernel("rbf", 0.0)
    x, gram = jnp.asarray(X), jnp.asarray(Y @ Y.T)
    with pytest.raises(ValueError, match="two tasks"):
        ridge.choose(x, gram, jnp.zeros(12))
    with pytest.raises(ValueError, match=r"gram \(12, 12\), groups \(3,\)"):
        ridge.choose(x, gram, jnp.zeros(3))
    with pytest.raises(ValueError, match="grid"):
        ridge.choose(x, gram, jnp.asarray(GROUPS), penalties=(0.0,))
    with pytest.raises(ValueError, match="not finite"):
        ridge.choose(x, gram.at[0, 0].set(jnp.nan), jnp.asarray(GROUPS), kinds=("linear",))
    with pytest.raises(ValueError, match="all conditions are equal"):
        ridge.median_distance(jnp.ones((3, 2)))

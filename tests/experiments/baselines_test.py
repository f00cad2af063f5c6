"""The baselines against their formulas in numpy: nearest, softmax, mean, ridge, projection."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stages import baselines, conditions


@pytest.fixture(scope="module")
def fitted(tiny_world, tiny_encoded):
    raw = conditions.canonical(tiny_world, tiny_encoded.names)
    trained = SimpleNamespace(fixed=SimpleNamespace(stats=conditions.scaling(raw)))
    return baselines.fit(tiny_world, tiny_encoded, trained), raw, trained.fixed.stats


def test_a_soup_is_the_mean_of_a_tasks_adapters(tiny_encoded):
    soups = baselines.soups_of(tiny_encoded)
    for k in range(len(tiny_encoded.names)):
        want = tiny_encoded.x[tiny_encoded.task == k].astype(np.float64).mean(0)
        np.testing.assert_allclose(soups[k], want, atol=1e-6)


def test_predictions_are_those_of_the_formulas(fitted):
    fit, raw, stats = fitted
    query = np.asarray(raw[2] * 0.9 + raw[1] * 0.1)
    cond = np.asarray(conditions.scaled(stats, jnp.asarray(query)))
    found = baselines.predict(fit, jnp.asarray(cond))
    soups, c = fit.soups.astype(np.float64), np.asarray(fit.conditions, np.float64)
    q = cond.reshape(-1).astype(np.float64)
    alike = c @ q / np.linalg.norm(c, axis=1) / np.linalg.norm(q)
    np.testing.assert_allclose(found["mean_adapter"], soups.mean(0), atol=1e-6)
    assert alike.argmax() == 2
    np.testing.assert_allclose(found["nearest"], soups[2], atol=1e-6)
    weight = np.exp((alike - alike.max()) / fit.temperature)
    want = np.einsum("k,ktd->td", weight / weight.sum(), soups)
    np.testing.assert_allclose(found["softmax"], want, atol=1e-5)
    inner = np.asarray(fit.kernel(fit.conditions, fit.conditions), np.float64)
    row = np.asarray(fit.kernel(jnp.asarray(cond.reshape(1, -1)), fit.conditions), np.float64)[0]
    centre = np.eye(len(c)) - 1 / len(c)
    y = soups.reshape(len(c), -1)
    alpha = np.linalg.solve(centre @ inner @ centre + fit.penalty * np.eye(len(c)), centre @ y)
    want = y.mean(0) + (row - inner.mean(1)) @ centre @ alpha
    np.testing.assert_allclose(found["ridge"].ravel(), want, rtol=1e-3, atol=1e-4)
    assert np.abs(found["ridge"] - found["mean_adapter"]).max() > 1e-3


def test_the_projection_is_the_nearest_point_of_the_affine_span(tiny_encoded):
    rng = np.random.default_rng(3)
    target = 0.05 * rng.normal(size=tiny_encoded.x.shape[1:]) * tiny_encoded.spec.mask
    got = baselines.project(tiny_encoded, target.astype(np.float32))
    x = tiny_encoded.x.reshape(len(tiny_encoded.x), -1).astype(np.float64)
    mean, directions = x.mean(0), x - x.mean(0)
    weight, *_ = np.linalg.lstsq(directions.T, target.ravel() - mean, rcond=1e-3)
    np.testing.assert_allclose(got.ravel(), mean + weight @ directions, atol=2e-3)
    inside = tiny_encoded.x[4]  # a member is its own projection
    np.testing.assert_allclose(baselines.project(tiny_encoded, inside), inside, atol=2e-3)

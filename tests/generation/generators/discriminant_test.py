"""The discriminant against float64 NumPy: scores of three classes, the textbook's two, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator, tiny
from jlora.generation.generators import discriminant
from jlora.generation.generators.discriminant import DiscriminantConfig

KEY = jax.random.key(0)
CONFIG = DiscriminantConfig(site="layers", shrinkage=0.7, gain=2.0)


def texts(seed=0):
    """Features of 50 texts around a mean that is not zero."""
    rng = np.random.default_rng(seed)
    return (1.0 + rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) / 2).astype("f4")


@functools.cache
def fitted(classes, config=CONFIG):
    at = generator.world(jl.LoRA(classes + 1, alpha=6.0), width=6 * classes)
    heads = np.linalg.qr(np.random.default_rng(1).normal(size=(6, classes)))[0].T.astype("f4")
    heads = heads[:, :5] if config.site == "last" else heads
    state = discriminant.fit(
        KEY, at.conditions, at.groups, at.bank, jnp.asarray(heads), config, jnp.asarray(texts())
    )
    return at, state, heads


def parts(classes):
    """(W, k, nu) of condition 0 in float64, straight from the equations."""
    at, _, _ = fitted(classes)
    x = texts().astype("f8")
    covariance = np.cov(x.T, bias=True)
    precision = np.linalg.inv(covariance + 0.7 * np.trace(covariance) / 6 * np.eye(6))
    means = np.asarray(at.queries[0], "f8").reshape(classes, 6)
    w = precision @ (means - means.mean(0)).T  # [m, C]
    half = -0.5 * np.einsum("cm,mn,cn->c", means, precision, means)
    # Over orthonormal contrasts the trace is that over all classes: W 1 = 0.
    nu = np.sqrt(np.trace(w.T @ covariance @ w) / (classes - 1))
    return w, half - half.mean(), nu, x, means, precision, covariance


def on_the_plane(x):
    """Features at which the constant column is exactly one."""
    mu = texts().astype("f8").mean(0)
    return x * (mu @ mu / (x @ mu))[:, None]


def added(adapter, f):
    """What the last matrix of the stack adds to its outputs, in float64."""
    own, _ = adapter.arrays(next(s for s, _ in adapter.sites if s.path == "layers"))
    a, b, scale = (np.asarray(own[k], "f8")[-1] for k in ("a", "b", "scale"))
    return f @ a @ b * scale


def test_three_classes_get_their_scores_along_their_heads():
    at, state, heads = fitted(3)
    w, k, nu, x, *_ = parts(3)
    f = on_the_plane(x)
    adapter = discriminant.generate(KEY, state, at.queries[0])
    want = 2.0 / nu * (f @ w + k)  # heads are orthonormal: a score per class
    np.testing.assert_allclose(added(adapter, f) @ heads.T.astype("f8"), want, rtol=2e-4, atol=2e-4)
    assert len(np.unique(want.argmax(1))) >= 2
    # Mutations: an offset that is forgotten, and one class for another, would be seen.
    assert np.abs(added(adapter, f) @ heads.T - 2.0 / nu * (f @ w)).max() > 0.1
    swapped = discriminant.generate(KEY, state, jnp.roll(at.queries[0], 6))
    np.testing.assert_allclose(
        added(swapped, f) @ np.roll(heads, -1, axis=0).T, want, rtol=2e-3, atol=2e-3
    )  # classes are exchangeable
    assert np.abs(added(swapped, f) @ heads.T - want).max() > 0.1


def test_two_classes_have_the_textbooks_direction_and_threshold():
    at, state, heads = fitted(2)
    *_, x, means, precision, covariance = parts(2)
    w = precision @ (means[1] - means[0])
    w = w / np.sqrt(w @ covariance @ w)  # unit variance
    f = on_the_plane(x)
    score = f @ w - w @ means.mean(0)  # zero halfway between the classes
    want = np.sqrt(2) * score[:, None] * (heads[1] - heads[0]).astype("f8")[None] / 2 * 2.0
    got = added(discriminant.generate(KEY, state, at.queries[0]), f)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_it_changes_one_matrix_and_lifted_is_merged():
    at, state, _ = fitted(2)
    p, adapter = tiny.params(), discriminant.generate(KEY, state, at.queries[0])
    merged = jl.merge(p, adapter)
    for name in ("first", "last"):
        np.testing.assert_array_equal(merged[name], p[name])
    np.testing.assert_array_equal(merged["layers"][0], p["layers"][0])
    assert np.abs(np.asarray(merged["layers"][1] - p["layers"][1])).max() > 0.1
    z, t = tiny.inputs(2), jnp.zeros(())
    lifted = jl.lift(tiny.model)(p, adapter, z[0], t)
    np.testing.assert_allclose(lifted, tiny.model(merged, z[0], t), atol=1e-5)


def test_gain_and_shrinkage_count_and_equal_classes_add_nothing():
    at, state, _ = fitted(2)
    one = added(discriminant.generate(KEY, state, at.queries[0]), texts())
    double = dataclasses.replace(state, config=dataclasses.replace(CONFIG, gain=4.0))
    two = added(discriminant.generate(KEY, double, at.queries[0]), texts())
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5)
    _, other, _ = fitted(2, dataclasses.replace(CONFIG, shrinkage=70.0))
    assert (
        np.abs(added(discriminant.generate(KEY, other, at.queries[0]), texts()) - one).max() > 0.1
    )
    same = jnp.tile(at.queries[0][:6], 2)
    assert np.abs(added(discriminant.generate(KEY, state, same), texts())).max() == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"config": DiscriminantConfig(site="up")}, "site: got 'up', expected one of"),
        ({"heads": jnp.ones((4, 6))}, r"heads: got shape \(4, 6\), expected .* rank 3"),
        ({"heads": jnp.ones((2, 5))}, r"heads: got shape \(2, 5\), expected \(C, 6\)"),
        ({"heads": jnp.ones((3, 6))}, r"conditions: got width 12, expected C m = 3 \* 6"),
        ({"features": jnp.ones((4, 5))}, r"features: got shape \(4, 5\), expected finite"),
        ({"features": jnp.full((4, 6), jnp.nan)}, r"features: got shape \(4, 6\), expected finite"),
    ],
)
def test_what_it_cannot_be_fitted_on_is_an_error(change, match):
    at = generator.world(jl.LoRA(3, freeze_a=True), width=12)
    given = {"heads": jnp.ones((2, 6)), "config": CONFIG} | change
    with pytest.raises(ValueError, match=match):
        discriminant.fit(KEY, at.conditions, at.groups, at.bank, **given)


def test_a_site_without_low_rank_factors_is_an_error():
    at = generator.world(jl.VeRA(3), width=12)
    with pytest.raises(ValueError, match=r"layers: got leaves .*expected a, b and scale"):
        discriminant.fit(KEY, at.conditions, at.groups, at.bank, jnp.ones((2, 6)), CONFIG)

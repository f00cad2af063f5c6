"""The diffusion loss against numpy: weights across kinds, laws of the times, dropped conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import loss, paths, predict
from jlora.generation.diffusion.loss import Objective

X = np.random.default_rng(0).standard_normal((6, 3, 2)).astype(np.float32)
COND = np.random.default_rng(1).standard_normal((6, 2, 4)).astype(np.float32)


def model(params, z, t, cond, null):
    """Affine in everything; shows what it was given as its activation."""
    shift = jnp.where(null, 0.0, cond.mean())
    return params * z + t + shift, {"z": z, "t": t, "shift": shift}


def evaluate(objective, fn=model, x=X, cond=COND, seed=3):
    call = jax.jit(lambda key, x, cond: loss.diffusion_loss(fn, 0.4, key, x, cond, objective))
    return call(jax.random.key(seed), x, cond)


@pytest.mark.parametrize("kind", ["v", "velocity"])
def test_loss_is_the_mean_squared_error_of_the_kind(kind):
    value, out = evaluate(Objective(paths.cosine(), kind, drop=0.5))
    t = np.asarray(out.t, np.float64)[:, None, None]
    alpha, sigma = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
    z = np.asarray(out.hidden["z"], np.float64)
    noise = (z - alpha * X) / sigma
    shift = np.where(out.null, 0.0, COND.mean((1, 2)))[:, None, None]
    told = 0.4 * z + t + shift
    scale = np.pi / 2 if kind == "velocity" else 1.0
    error = told - scale * (alpha * noise - sigma * X)  # on this path velocity = pi / 2 v
    np.testing.assert_allclose(out.losses, (error**2).mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(value, (error**2).mean(), rtol=1e-4)
    np.testing.assert_allclose(out.x0, alpha * z - sigma * told / scale, rtol=1e-3, atol=1e-4)
    assert 0 < np.sum(out.null) < 6


def knows_x0_to_be(guess, path, kind):
    def fn(params, z, t, cond, null):
        del params, cond, null
        return predict.convert(path, "x0", kind, guess + jnp.zeros_like(z), z, t), None

    return fn


@pytest.mark.parametrize("name", sorted(paths.PATHS))
@pytest.mark.parametrize("kind", predict.KINDS)
def test_min_snr_weighs_the_x0_error_alike_in_every_kind(name, kind):
    path, gamma = paths.path(name), 2.0
    objective = Objective(path, kind, times="stratified", t_min=0.05, min_snr=gamma)
    _, out = evaluate(objective, knows_x0_to_be(0.5, path, kind))
    alpha, sigma = jax.vmap(path)(out.t)
    expected = np.minimum((alpha / sigma) ** 2, gamma) * ((X - 0.5) ** 2).mean((1, 2))
    np.testing.assert_allclose(out.losses, expected, rtol=5e-3)
    np.testing.assert_allclose(out.x0, 0.5, atol=2e-3)
    # The check means something: without the weight the kinds differ.
    if kind == "v":
        _, bare = evaluate(
            Objective(path, kind, times="stratified", t_min=0.05), knows_x0_to_be(0.5, path, kind)
        )
        assert np.abs(bare.losses / expected - 1.0).max() > 0.1


def times(**kwargs):
    objective = Objective(paths.cosine(), "v", **kwargs)
    draw = jax.jit(lambda key: loss.draw_times(key, 4000, objective))
    return np.asarray(draw(jax.random.key(0)), np.float64)


def test_times_follow_their_law():
    uniform = times(t_min=0.2)
    assert uniform.min() >= 0.2 and uniform.max() < 1.0
    assert abs(uniform.mean() - 0.6) < 0.015
    discrete = times(times="discrete", steps=10)
    steps, counts = np.unique(np.round(discrete * 10, 4), return_counts=True)
    np.testing.assert_array_equal(steps, np.arange(1, 11))
    assert counts.min() > 320
    strata = times(times="stratified", t_min=0.2)
    assert np.any(np.diff(strata) < 0)  # in random order
    inside = (np.sort(strata) - 0.2) / 0.8 * 4000 - np.arange(4000)
    assert inside.min() > -1e-2 and inside.max() < 1.0 + 1e-2
    normal = times(times="logit_normal", logit_mean=-0.5, logit_std=0.7)
    logit = np.log(normal / (1 - normal))
    assert abs(logit.mean() + 0.5) < 0.04 and abs(logit.std() - 0.7) < 0.03


def test_conditions_are_dropped_with_their_probability():
    many = np.repeat(X[:1], 2000, 0), np.repeat(COND[:1], 2000, 0)
    for p in (0.0, 0.25, 1.0):
        _, out = evaluate(Objective(paths.cosine(), "v", drop=p), x=many[0], cond=many[1])
        assert abs(np.mean(out.null) - p) < 0.03
        np.testing.assert_array_equal(np.asarray(out.hidden["shift"]) == 0.0, out.null)


def test_time_bug_tells_everybody_the_first_time():
    _, sound = evaluate(Objective(paths.cosine(), "v"))
    _, bug = evaluate(Objective(paths.cosine(), "v", time_bug=True))
    np.testing.assert_array_equal(sound.hidden["t"], sound.t)
    np.testing.assert_array_equal(bug.t, sound.t)
    np.testing.assert_array_equal(bug.hidden["t"], np.repeat(sound.t[:1], 6))
    np.testing.assert_array_equal(bug.hidden["z"], sound.hidden["z"])


def test_bad_objectives_are_errors():
    for kwargs, text in (
        ({"kind": "noise"}, "'noise'"),
        ({"times": "beta"}, "'beta'.*'stratified'"),
        ({"t_min": 0.0}, "t_min=0.0"),
        ({"drop": 1.5}, "drop=1.5"),
        ({"min_snr": -1.0}, "min_snr=-1.0"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(ValueError, match=text):
            Objective(paths.cosine(), **kwargs)

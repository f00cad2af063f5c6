"""Guidance: its limits, its independence of the prediction kind, and the model wrappers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import guidance, paths, predict


def arrays(count):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal((3, 2)), jnp.float32) for _ in range(count)]


def model(params, z, t, cond, null):
    """Linear in z; the null flag switches the condition off."""
    shift = jnp.where(null, -1.0, cond.sum())
    return params * z + t + shift, z


def test_combine_is_the_extrapolation():
    null, conditional = arrays(2)
    got = guidance.combine(null, conditional, jnp.float32(3.0))
    np.testing.assert_allclose(got, 3.0 * conditional - 2.0 * null, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(guidance.combine(null, conditional, jnp.float32(0.0)), null)
    one = guidance.combine(null, conditional, jnp.float32(1.0))
    np.testing.assert_allclose(one, conditional, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(paths.PATHS))
@pytest.mark.parametrize("goal", predict.KINDS)
def test_guidance_commutes_with_conversion(name, goal):
    path, t, scale = paths.path(name), jnp.float32(0.6), jnp.float32(2.5)
    z, null, conditional = arrays(3)

    def tell(value):
        return predict.convert(path, "eps", goal, value, z, t)

    before = tell(guidance.combine(null, conditional, scale))
    after = guidance.combine(tell(null), tell(conditional), scale)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    # Weights that do not add to one break the law: this is what it guards.
    if goal != "eps":
        wrong = tell(null + scale * conditional)
        broken = tell(null) + scale * tell(conditional)
        assert np.abs(wrong - broken).max() > 1e-2


def test_wrappers_call_the_model_as_told():
    z, cond = arrays(2)
    params, t = jnp.float32(0.5), jnp.float32(0.25)
    conditional = model(params, z, t, cond, False)[0]
    null = model(params, z, t, cond, True)[0]
    np.testing.assert_allclose(guidance.plain(model)(params, z, t, cond), conditional)
    got = guidance.guided(model)(params, z, t, cond, jnp.float32(1.7))
    np.testing.assert_allclose(got, null + 1.7 * (conditional - null), rtol=1e-5, atol=1e-5)


def test_two_scales_equal_is_guidance_with_the_base_null():
    z, cond = arrays(2)
    base, tuned, t, w = jnp.float32(0.5), jnp.float32(-0.75), jnp.float32(0.25), jnp.float32(1.7)
    null, strong = model(base, z, t, cond, True)[0], model(tuned, z, t, cond, False)[0]
    denoise = guidance.guided_two(model)
    got = denoise((base, tuned), z, t, cond, w, w)
    np.testing.assert_allclose(got, guidance.combine(null, strong, w), rtol=1e-5, atol=1e-5)
    weak = model(base, z, t, cond, False)[0]
    got = denoise((base, tuned), z, t, cond, w, jnp.float32(0.0))
    np.testing.assert_allclose(got, guidance.combine(null, weak, w), rtol=1e-5, atol=1e-5)

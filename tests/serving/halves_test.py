"""Guidance on two devices is guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.serving import halves


def model(params, z, t, cond, null):
    """params z + t cond or params z + 1, the second term added by a scan that starts without it."""

    def step(x, share):
        return x + share * jnp.where(null, 1.0, t * cond), None

    return jax.lax.scan(step, params * z, jnp.asarray([0.25, 0.75]))[0]


ARGS = (jnp.float32(0.5), jnp.arange(4.0), jnp.float32(0.3), jnp.float32(2.0))


def expected(scale):
    z = np.arange(4.0)
    null, conditional = 0.5 * z + 1.0, 0.5 * z + 0.3 * 2.0
    return null + scale * (conditional - null)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_halves_by_numpy(scale):
    denoise = jax.jit(halves.guided(model, halves.mesh()))
    np.testing.assert_allclose(denoise(*ARGS, scale), expected(scale), rtol=1e-5)


def test_mutation_halves_that_are_both_conditional():
    both = halves.guided(lambda p, z, t, c, null: model(p, z, t, c, False), halves.mesh())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(both(*ARGS, 2.5), expected(2.5), rtol=1e-5)


def test_the_halves_run_on_both_devices():
    run = jax.jit(halves.guided(model, halves.mesh()))
    text = run.lower(*ARGS, 2.0).compile().as_text()
    assert "all-reduce" in text and "num_partitions=2" in text


def test_errors():
    with pytest.raises(ValueError, match="got 1 devices, expected 2"):
        halves.mesh((jax.devices()[0],))
    with pytest.raises(ValueError, match=r"expected \{'half': 2\}"):
        halves.guided(model, jax.make_mesh((1,), ("half",), (jax.sharding.AxisType.Auto,)))

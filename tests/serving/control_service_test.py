"""The service: exact where it waits, one step behind where it does not, on two devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.serving import control_service as lib

STEPS = 4
Z = np.asarray([0.5, -1.0], np.float32)
PARTS = lib.Parts(
    jax.jit(lambda p, z, k: p * z + k),
    jax.jit(lambda c, z, k: c * jnp.sin(z) - k),
    jax.jit(lambda p, e, r, z, k: z + 0.1 * (e + r) * p + k),
)


def by_numpy(stale):
    z, before, used = Z.astype(np.float64), None, []
    for k in range(STEPS):
        r = 2.0 * np.sin(z) - k
        given = before if stale and k else r
        z, before = z + 0.1 * (0.5 * z + k + given) * 0.5 + k, r
        used.append(given)
    return z, used


@pytest.fixture(scope="module")
def at():
    one, other = jax.devices()[:2]
    return lib.placed(jnp.float32(0.5), jnp.float32(2.0), one, other)


@pytest.mark.parametrize("stale", [False, True])
def test_both_forms_by_numpy(at, stale):
    got, used = lib.run(PARTS, at, jnp.asarray(Z), STEPS, stale=stale)
    expected, given = by_numpy(stale)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(used, given, rtol=1e-5)
    assert got.devices() == {at.base}


def test_mutation_a_pipeline_that_is_never_stale(at):
    with pytest.raises(AssertionError):
        got, _ = lib.run(PARTS, at, jnp.asarray(Z), STEPS, stale=False)
        np.testing.assert_allclose(got, by_numpy(True)[0], rtol=1e-5)


def test_the_branch_runs_on_the_device_of_the_service(at):
    seen = []

    def branch(c, z, k):
        out = PARTS.branch(c, z, k)
        seen.append(out.devices())
        return out

    lib.run(PARTS._replace(branch=branch), at, jnp.asarray(Z), 2)
    assert seen == [{at.service}] * 2 and at.service != at.base


def test_no_steps_are_an_error(at):
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1"):
        lib.run(PARTS, at, jnp.asarray(Z), 0)

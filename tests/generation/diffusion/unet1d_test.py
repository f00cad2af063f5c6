"""The 1-D convolutional U-Net of the paper against a numpy forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import dit, unet1d

S, L, C, E = 3, 2, 2, 2
MODEL = unet1d.UNet1d(channels=(3, 4, 5), steps=10)
FORWARD = jax.jit(dit.bind(MODEL))


def example(seed=0, t=0.3):
    rng = np.random.default_rng(seed)
    z, cond = rng.standard_normal((S, L)), rng.standard_normal((C, E))
    return jnp.asarray(z, jnp.float32), jnp.float32(t), jnp.asarray(cond, jnp.float32)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: dit.init(MODEL, jax.random.key(0), (S, L), (C, E)))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(7)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


def oracle(params, z, row, cond, skips=True):
    """The equations of the docstring, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    time = p["time"]["embedding"][row][:, None]

    def block(p, x):
        kernel, padded = p["conv"]["kernel"], np.pad(x, ((1, 1), (0, 0)))
        y = sum(padded[k : k + len(x)] @ kernel[k] for k in range(3)) + p["conv"]["bias"]
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
        return np.where(y > 0, y, 0.01 * y)

    x = np.concatenate([np.asarray(cond).reshape(-1), np.asarray(z).reshape(-1)])[:, None]
    h1 = block(p["down_0"], x + time)
    h2 = block(p["down_1"], h1 + time)
    h3 = block(p["down_2"], h2 + time)
    u = block(p["up_0"], h3 + time) + (h2 if skips else 0)
    u = block(p["up_1"], u + time) + (h1 if skips else 0)
    u = block(p["up_2"], u + time)
    y = u[:, 0] @ p["out"]["kernel"] + p["out"]["bias"]
    return y[C * E :].reshape(S, L), h1


def test_forward_is_the_docstring(params):
    z, t, cond = example()
    got, hidden = FORWARD(params, z, t, cond, jnp.asarray(False))
    expected, first = oracle(params, z, 2, cond)  # t = 3 / 10 is the third row
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(hidden, first, rtol=1e-3, atol=1e-4)
    for wrong in (oracle(params, z, 3, cond), oracle(params, z, 2, cond, skips=False)):
        assert np.abs(got - wrong[0]).max() > 1e-2


def test_null_is_the_zero_condition(params):
    z, t, cond = example()
    got, _ = FORWARD(params, z, t, cond, jnp.asarray(True))
    np.testing.assert_allclose(got, oracle(params, z, 2, 0 * cond)[0], rtol=1e-3, atol=1e-4)


def test_first_and_last_step_have_rows_of_their_own(params):
    for t, row in ((0.1, 0), (1.0, 9), (0.7, 6)):
        z, time, cond = example(t=t)
        got, _ = FORWARD(params, z, time, cond, jnp.asarray(False))
        np.testing.assert_allclose(got, oracle(params, z, row, cond)[0], rtol=1e-3, atol=1e-4)


def test_vmap_gives_every_example_its_own_time(params):
    many = [jnp.stack(x) for x in zip(example(0, 0.2), example(1, 0.9), strict=True)]
    flags = jnp.asarray([False, True])
    out, _ = jax.jit(jax.vmap(dit.bind(MODEL), in_axes=(None, 0, 0, 0, 0)))(params, *many, flags)
    one, _ = FORWARD(params, *example(1, 0.9), flags[1])
    np.testing.assert_allclose(out[1], one, rtol=1e-3, atol=1e-4)


def test_widths_and_errors():
    full = jax.eval_shape(
        lambda: dit.init(unet1d.UNet1d(), jax.random.key(0), (S, L), (C, E)),
    )
    widths = [
        full[f"{way}_{k}"]["conv"]["kernel"].shape for way in ("down", "up") for k in range(4)
    ]
    assert [w[1:] for w in widths] == [
        (1, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 256),
        (256, 128),
        (128, 64),
        (64, 1),
    ]
    assert full["time"]["embedding"].shape == (1000, S * L + C * E)
    with pytest.raises(ValueError, match="at least two"):
        dit.init(unet1d.UNet1d(channels=(4,)), jax.random.key(0), (S, L), (C, E))

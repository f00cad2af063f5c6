"""Styles are put on in order; a picture's share of them; the clock that gates read."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import autolora_gate as lib
from experiments.styles import distill
from experiments.styles.pictures import tiny_base
from experiments.styles.transforms import transformed
from experiments.styles.zoo_training import fresh
from jlora.compose.gated_fusion import gated
from jlora.models import dit


def test_styles_are_put_on_in_their_order():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    triple = (("invert", 1.0), ("tint", 120.0), ("stripes", 4.0))
    np.testing.assert_array_equal(lib.dressed(pixels, triple, (0, 0, 0)), pixels)
    want = transformed(transformed(pixels, "invert", 1.0), "stripes", 4.0)
    np.testing.assert_array_equal(lib.dressed(pixels, triple, (1, 0, 1)), want)
    other = lib.dressed(pixels, triple[::-1], (1, 0, 1))
    assert np.abs(other.astype(int) - want).max() > 10


def test_shares_are_of_each_picture_and_stay_with_who_drew_it():
    corners = np.asarray([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    features = 10.0 * np.repeat(corners, 5, axis=0)
    none = np.zeros(0, np.int32)
    one = lib.Target("", none, none, none, None, none, features, np.repeat(corners, 5, axis=0))  # pyright: ignore[reportArgumentType]
    got = lib.shares(one, {"two": 10.0 * corners[3:4], "rest": 10.0 * corners[[0, 7, 4]]})
    np.testing.assert_allclose(got["two"], [2 / 3])
    np.testing.assert_allclose(got["rest"], [0, 1, 1 / 3])


def test_gates_read_the_time_of_the_clock():
    base, steps = tiny_base(), 4
    adapters = [fresh(base.config, 2, distill.STYLE_SITES, jl.LoRA(2), k) for k in range(2)]
    rng = np.random.default_rng(0)
    draw = lambda t: jnp.asarray(0.3 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    adapters = [a.replace(trainable=jax.tree.map(draw, a.trainable)) for a in adapters]
    gates = gated(jax.random.key(0), adapters, cosines=2)
    gates = gates.replace(trainable=jax.tree.map(draw, gates.trainable))
    z = jnp.asarray(rng.normal(size=(8, 8, 3)), jnp.float32)
    given = dit.Condition(jnp.int32(1), jnp.asarray([2, 0], jnp.int32))
    model = jax.jit(lib.denoiser(base.config))

    def at(clock):
        params = base.params, gates, None if clock is None else jnp.asarray(clock, jnp.float32)
        return np.asarray(model(params, z, jnp.float32(0.25), given, jnp.asarray(False))[0])

    clock = np.linspace(0, 1, steps + 1)
    np.testing.assert_allclose(at(clock), at(None), atol=1e-6)
    assert np.abs(at(clock[::-1]) - at(None)).max() > 1e-4

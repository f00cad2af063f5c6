"""The control branch of a tiny base: edges, training, and the parts against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pictures.data import scaled
from experiments.styles import control as lib
from experiments.styles.distill import Recipe
from experiments.styles.pictures import shapes, tiny_base
from jlora.models import dit
from jlora.models.dit import control
from jlora.serving import control_service

RECIPE = Recipe("", 0, 0.0, 3, 4, 1e-2)
PIXELS = np.stack([p.pixels for p in shapes("google")[:4]])
CONDITION = dit.Condition(jnp.ones(4, jnp.int32), jnp.asarray([[2, 3], [4, 0], [5, 0], [6, 2]]))


def rows(step):
    return scaled(PIXELS), CONDITION


def test_edges_are_where_brightness_changes():
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    picture[:, :, 2:] = 255
    expected = np.tile(np.asarray([0.0, 1.0, 1.0, 0.0])[:, None], (1, 4, 1, 1))
    np.testing.assert_allclose(lib.edges(picture), expected)
    np.testing.assert_allclose(lib.agreement(PIXELS, lib.edges(PIXELS)), 1.0)
    assert (lib.agreement(PIXELS, lib.edges(PIXELS[::-1])) < 0.9).all()


@pytest.fixture(scope="module")
def world():
    base = tiny_base()
    return base, lib.train(base, RECIPE, rows, 0)


def test_the_branch_is_trained_and_the_base_is_not(world):
    base, (own, losses) = world
    assert len(losses) == 3 and np.isfinite(losses).all()
    fresh = control.init(jax.random.key(0), base.params, base.config, 1)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), own, fresh)
    assert min(moved["out"]["kernel"], moved["edges"]["kernel"]) > 0
    again = tiny_base().params  # no buffer of the base was given up
    jax.tree.map(np.testing.assert_array_equal, base.params, again)


def test_parts_are_a_step_of_guided_euler(world):
    base, (own, _) = world
    drawing, scale, steps = lib.edges(PIXELS), 2.0, 5
    z = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    device = jax.devices()[0]
    at = control_service.placed(
        (base.params, CONDITION), (own, base.params, CONDITION, drawing), device, device
    )
    parts = lib.parts(base.config, steps, scale)
    got, _ = control_service.run(parts, at, z, 1)

    def velocity(null):
        one = lambda z, e, c: control.controlled(  # noqa: E731
            own, base.params, z, e, jnp.float32(1.0), c, null, base.config
        )
        return jax.vmap(one)(z, drawing, CONDITION)

    null, asked = velocity(True), velocity(False)
    expected = z - (null + scale * (asked - null)) / steps
    np.testing.assert_allclose(got, expected, atol=2e-4)

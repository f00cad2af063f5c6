"""The control branch: silent at first, equal to the whole model, and heard once it is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import dit
from jlora.models.dit import control as lib

CONFIG = dit.DiTConfig(styles=1, words=4, patch=2, width=8, depth=4, heads=2, ffn=8, rank=2)
CONDITION = dit.Condition(jnp.int32(1), jnp.asarray([2, 0]))
TIME = jnp.float32(0.4)


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def world():
    params = drawn(jax.eval_shape(lambda: dit.init(jax.random.key(0), CONFIG)), 0)
    fresh = lib.init(jax.random.key(1), params, CONFIG, 1)
    picture, edges = drawn((jnp.zeros((4, 4, 3)), jnp.zeros((4, 4, 1))), 2)
    run = jax.jit(lambda c, p, z, e: lib.controlled(c, p, z, e, TIME, CONDITION, False, CONFIG))
    return params, fresh, picture, edges, run


def test_a_fresh_branch_leaves_the_base_as_it_is(world):
    params, fresh, picture, edges, run = world
    base = dit.forward(params, picture, TIME, CONDITION, config=CONFIG).velocity
    np.testing.assert_allclose(run(fresh, params, picture, edges), base, atol=1e-5)


def test_the_gradient_of_a_fresh_branch_reaches_its_last_layer_alone(world):
    params, fresh, picture, edges, run = world
    grads = jax.grad(lambda c: jnp.sum(run(c, params, picture, edges) ** 2))(fresh)
    assert float(jnp.abs(grads["out"]["kernel"]).min(axis=(1, 2)).max()) > 0
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads["blocks"]))


def check(world, used):
    """Blocks one by one: residuals of the branch at the inputs of the second half."""
    params, fresh, picture, edges, run = world
    control = drawn(fresh, 3)
    x, c, words, seen = lib.begin(params, picture, TIME, CONDITION, False, CONFIG)
    blocks = lambda tree, n: jax.tree.map(lambda a: a[n], tree)  # noqa: E731

    def one(leaves, x):
        return dit.block(leaves, x, c, params["modulation"], words, seen, CONFIG.heads).tokens

    tokens = np.asarray(edges).reshape(2, 2, 2, 2, 1).transpose(0, 2, 1, 3, 4).reshape(4, 4)
    u = x + tokens @ np.asarray(control["edges"]["kernel"]) + control["edges"]["bias"][None]
    added = []
    for n in range(2):
        u = one(blocks(control["blocks"], n), u)
        added.append(u @ control["out"]["kernel"][n] + control["out"]["bias"][n][None])
    for n in range(4):
        x = one(blocks(params["blocks"], n), x + added[n - 2] if n >= 2 and used else x)
    expected = lib.end(params, x, c, picture.shape, CONFIG)
    np.testing.assert_allclose(run(control, params, picture, edges), expected, atol=1e-4)


def test_the_branch_block_by_block(world):
    check(world, True)


def test_mutation_a_branch_that_is_not_heard(world):
    with pytest.raises(AssertionError):
        check(world, False)


def test_errors(world):
    params, fresh, picture, edges, _ = world
    with pytest.raises(ValueError, match="depth: got 3, expected an even one"):
        lib.init(jax.random.key(0), params, dit.DiTConfig(1, 2, depth=3), 1)
    with pytest.raises(ValueError, match=r"edges: got shape \(2, 2, 1\)"):
        lib.branch(
            fresh, params, picture, edges[:2, :2], TIME, CONDITION, False, CONFIG
        )  # fmt: skip

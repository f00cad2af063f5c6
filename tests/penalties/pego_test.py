"""PEGO: both terms by numpy, where they vanish, and what the second is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.penalties import pego
from jlora.penalties.pego import of_matrix

RNG = np.random.default_rng(0)
SHAPE = (2, 7, 5)  # a stack of two matrices


def leaf(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def world():
    """(adapter of a stack and of one matrix, params)."""
    params = {"layers": {"w": leaf(*SHAPE)}, "head": leaf(5, 7)}
    sites = [
        (jl.Site("layers/w", SHAPE, "sio", np.dtype("float32"), ("dot",)), jl.LoRA(6, 12.0)),
        (jl.Site("head", (5, 7), "io", np.dtype("float32"), ("dot",)), jl.LoRA(6, 6.0)),
    ]
    flat = {"layers/w": params["layers"]["w"], "head": params["head"]}
    fresh = initialise(jax.random.key(0), sites, flat)
    moved = jax.tree.map(lambda t: t + 0.3 * leaf(*t.shape), fresh.trainable)
    return fresh, fresh.replace(trainable=moved), params


def by_numpy(w, a, b, scale, groups):
    """Of dense deltas."""
    w, a, b = (np.asarray(t, np.float64) for t in (w, a, b))
    r = a.shape[1] // groups
    deltas = [scale * a[:, k : k + r] @ b[k : k + r] for k in range(0, a.shape[1], r)]
    own = sum(np.abs(w.T @ d).sum() for d in deltas)
    pairs = [np.abs(x.T @ y).sum() for k, x in enumerate(deltas) for y in deltas[k + 1 :]]
    return own + sum(pairs)


def check_value(world, groups=3):
    _, adapter, params = world
    t = adapter.trainable
    want = by_numpy(params["head"], *(t["head"][k] for k in ("a", "b")), 1.0, groups)
    for k in range(2):
        own = (t["layers/w"][name][k] for name in ("a", "b"))
        want += by_numpy(params["layers"]["w"][k], *own, 2.0, groups)
    found = pego(adapter, params, groups, 0.5)
    np.testing.assert_allclose(found, 0.5 * want, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_value(world, groups):
    check_value(world, groups)


def test_value_and_gradient_are_zero_at_the_start(world):
    fresh, _, params = world
    value, slope = jax.value_and_grad(lambda t: pego(fresh.replace(trainable=t), params, 2))(
        fresh.trainable
    )
    assert float(value) == 0 and not any(np.any(x) for x in jax.tree.leaves(slope))


def test_limit_orthogonal_to_the_weight_and_to_one_another():
    """Column spaces of W, A_1 and A_2 are orthogonal: all products vanish."""
    q = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    w, a = q[:, :4] @ RNG.normal(size=(4, 6)), q[:, 4:]
    arrays = [jnp.asarray(t, jnp.float32) for t in (w, a, RNG.normal(size=(4, 6)))]
    assert float(of_matrix(*arrays, 2)) < 1e-4
    assert float(of_matrix(jnp.asarray(q[:, 2:8] * 1.0, jnp.float32), *arrays[1:], 2)) > 1.0


def test_descent_makes_the_group_diverse(world):
    """The second term alone: the base is zero."""
    _, adapter, params = world
    zero = jax.tree.map(jnp.zeros_like, params)
    loss = jax.jit(jax.value_and_grad(lambda t: pego(adapter.replace(trainable=t), zero, 3)))
    t = adapter.trainable
    first, _ = loss(t)
    for _ in range(40):
        _, slope = loss(t)
        t = jax.tree.map(lambda x, g: x - 2e-3 * g, t, slope)
    assert float(loss(t)[0]) < 0.7 * float(first)


def test_other_methods_do_not_count_and_half_precision_is_widened(world):
    _, adapter, params = world
    half = jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter.trainable)
    assert pego(adapter.replace(trainable=half), params, 2).dtype == jnp.float32
    x = jnp.ones((1, 5))
    other = jl.init(jax.random.key(0), lambda p, x: x @ p["head"], params, x,
                    methods={"head": jl.DoRA(2)})  # fmt: skip
    assert float(pego(other, params)) == 0.0


def test_refusals(world):
    _, adapter, params = world
    with pytest.raises(ValueError, match=": groups: got 4, expected a divisor of rank 6"):
        pego(adapter, params, 4)
    with pytest.raises(ValueError, match="weight: got -1"):
        pego(adapter, params, 2, -1)
    with pytest.raises(ValueError, match="head: got no such leaf of params"):
        pego(adapter, {"layers": params["layers"]}, 2)


def test_mutation_without_pairs_is_seen(world, monkeypatch):
    monkeypatch.setattr(itertools, "combinations", lambda *a: [])
    with pytest.raises(AssertionError):
        check_value(world)

"""LCM-LoRA's arithmetic: the sum by dense matrices, fewer steps of a styled model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.merging.exact.lcm_arithmetic import lcm_arithmetic


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS = {"a": leaf(6, 6), "b": leaf(6, 6, seed=1)}


def apply(p, x):
    return (x @ p["a"]) @ p["b"]


def adapter(seed, pattern, rank):
    x = jnp.ones((2, 6))
    a = jl.init(jax.random.key(seed), apply, PARAMS, x, methods={pattern: jl.LoRA(rank)})
    new = jax.tree.map(lambda t: leaf(*t.shape, seed=seed + 10), a.trainable)
    return a.replace(trainable=new)


STYLE, OTHER, FAST = adapter(0, "a", 2), adapter(1, "a|b", 1), adapter(2, "a|b", 3)


def test_value_by_dense_matrices_where_sites_differ():
    got = jl.merge(PARAMS, lcm_arithmetic([STYLE, OTHER], FAST, style=(0.5, -0.2), strength=0.9))
    style, other, fast = (jl.delta(PARAMS, a) for a in (STYLE, OTHER, FAST))
    a = PARAMS["a"] + 0.5 * style["a"] - 0.2 * other["a"] + 0.9 * fast["a"]
    b = PARAMS["b"] - 0.2 * other["b"] + 0.9 * fast["b"]
    np.testing.assert_allclose(got["a"], a, atol=1e-5)
    np.testing.assert_allclose(got["b"], b, atol=1e-5)


def test_limits_and_defaults():
    alone = jl.merge(PARAMS, lcm_arithmetic(STYLE, FAST, style=0.0))
    np.testing.assert_allclose(alone["b"], jl.merge(PARAMS, FAST)["b"], atol=1e-5)
    both = jl.delta(PARAMS, lcm_arithmetic(STYLE, FAST))
    expected = 0.8 * jl.delta(PARAMS, STYLE)["a"] + jl.delta(PARAMS, FAST)["a"]
    np.testing.assert_allclose(both["a"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="style: got 2, expected one for each of 1 styles"):
        lcm_arithmetic(STYLE, FAST, style=(1.0, 2.0))


def world(seed=0):
    """A flow x' = x V of a base and of a styled V; tau makes one step of the base worth eight."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(6, 6)) / 4
    style = 0.1 * np.outer(rng.normal(size=6), rng.normal(size=6)) / 2

    def eight(v):
        return np.linalg.matrix_power(np.eye(6) + v / 8, 8)

    tau = eight(v) - np.eye(6) - v
    return v, style, tau, eight


def lora(delta):
    u, s, vt = np.linalg.svd(delta)
    a = jl.init(jax.random.key(0), lambda p, x: x @ p["v"], {"v": jnp.zeros((6, 6))},
                jnp.ones((1, 6)), methods={"v": jl.LoRA(6, 6.0)})  # fmt: skip
    new = {"a": jnp.asarray(u * s, jnp.float32), "b": jnp.asarray(vt, jnp.float32)}
    return a.replace(trainable={"v": new})


def errors(seed, styles=lora):
    """Distance of one step to eight steps of the styled flow: without and with the vector."""
    v, style, tau, eight = world(seed)
    params = {"v": jnp.asarray(v, jnp.float32)}
    slow, fast = styles(style), lora(tau)
    truth = eight(v + style)
    steps = [jl.merge(params, x)["v"] + np.eye(6) for x in (
        slow, lcm_arithmetic(slow, fast, style=1.0), fast)]  # fmt: skip
    return [float(np.linalg.norm(s - truth)) for s in steps]


@pytest.mark.parametrize("seed", range(3))
def test_the_vector_of_the_base_makes_a_styled_model_fast(seed):
    """The paper's claim in small: closer to many steps of the styled model than the style without
    the vector, and than the vector without the style."""
    without, together, no_style = errors(seed)
    assert together < 0.6 * without and together < 0.6 * no_style


def test_mutation_the_vector_turned_round():
    with pytest.raises(AssertionError):
        v, style, tau, eight = world()
        params = {"v": jnp.asarray(v, jnp.float32)}
        wrong = lcm_arithmetic(lora(style), lora(tau), style=1.0, strength=-1.0)
        got = jl.merge(params, wrong)["v"] + np.eye(6)
        assert float(np.linalg.norm(got - eight(v + style))) < errors(0)[0]

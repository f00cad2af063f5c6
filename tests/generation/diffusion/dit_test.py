"""The site-token DiT against a numpy forward pass, its zero start, and its symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import dit

S, L, C, E = 3, 2, 2, 5
MODEL = dit.DiT(width=8, depth=8, heads=2, ratio=2)
FORWARD = jax.jit(dit.bind(MODEL))


def example(seed=0):
    rng = np.random.default_rng(seed)
    z, cond = rng.standard_normal((S, L)), rng.standard_normal((C, E))
    return jnp.asarray(z, jnp.float32), jnp.float32(0.3), jnp.asarray(cond, jnp.float32)


def noise(params):
    """All parameters drawn anew: nothing is zero, nothing is a neutral element."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(7)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


@pytest.fixture(scope="module")
def params():
    return dit.init(MODEL, jax.random.key(0), (S, L), (C, E))


@pytest.fixture(scope="module")
def random(params):
    return noise(params)


def oracle(params, z, t, cond, null, heads=2):
    """The equations of the docstring, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    z, t, cond = (np.asarray(x, np.float64) for x in (z, t, cond))

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def mlp(p, x):
        return dense(p["down"], gelu(dense(p["up"], x)))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    def attention(p, x):
        def heads_of(q):
            return np.einsum("td,dhk->htk", x, q["kernel"]) + q["bias"][:, None]

        q, k, v = (heads_of(p[name]) for name in ("query", "key", "value"))
        logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        return np.einsum("htk,hkd->td", mixed, p["out"]["kernel"]) + p["out"]["bias"]

    unit = cond / np.sqrt((cond**2).mean(-1, keepdims=True) + 1e-6)
    unit = p["null"] if null else unit
    words = dense(p["condition"], unit) + p["role"]
    half = np.exp(-np.log(1e4) * np.arange(4) / 4) * 1000 * t
    phi = np.concatenate([np.cos(half), np.sin(half)])
    c = mlp(p["pool"], unit.reshape(-1)) + mlp(p["time"], phi)
    h = np.concatenate([words, dense(p["tokens"], z) + p["site"]])
    states = []
    for k in range(8):
        b = jax.tree.map(lambda x, k=k: x[k], p["blocks"])
        m = np.split(dense(b["modulation"], silu(c)), 6)
        h = h + m[2] * attention(b["attention"], (1 + m[0]) * norm(h) + m[1])
        h = h + m[5] * mlp(b["mlp"], (1 + m[3]) * norm(h) + m[4])
        states.append(h[-S:])
    scale, shift = np.split(dense(p["last_modulation"], silu(c)), 2)
    return dense(p["out"], (1 + scale) * norm(h[-S:]) + shift), states


@pytest.mark.parametrize("null", [False, True])
def test_forward_is_the_docstring(random, null):
    got, hidden = FORWARD(random, *example(), jnp.asarray(null))
    expected, states = oracle(random, *example(), null)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(hidden, states[1], rtol=2e-3, atol=2e-4)  # block 8 // 4 = the second
    assert np.abs(hidden - states[2]).max() > 1e-2
    other, _ = oracle(random, *example(), not null)  # and the oracle tells the flag
    assert np.abs(got - other).max() > 1e-2


def test_a_fresh_model_returns_zero_and_is_the_identity_inside(params):
    z, t, cond = example()
    out, hidden = FORWARD(params, z, t, cond, jnp.asarray(False))
    np.testing.assert_array_equal(out, np.zeros((S, L)))
    tokens = z @ params["tokens"]["kernel"] + params["site"]
    np.testing.assert_allclose(hidden, tokens, rtol=1e-5, atol=1e-6)
    # Zero gates make it so: one open gate is seen.
    gates = params["blocks"]["modulation"]["bias"].at[:, 16:24].set(1.0)
    blocks = params["blocks"] | {"modulation": params["blocks"]["modulation"] | {"bias": gates}}
    _, moved = FORWARD(params | {"blocks": blocks}, z, t, cond, jnp.asarray(False))
    assert np.abs(moved - hidden).max() > 1e-2


def test_sites_permute_with_their_embeddings(random):
    z, t, cond = example()
    order = np.asarray([2, 0, 1])
    here = FORWARD(random, z, t, cond, jnp.asarray(False))
    moved = random | {"site": random["site"][order]}
    there = FORWARD(moved, z[order], t, cond, jnp.asarray(False))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a[order], b, rtol=1e-3, atol=1e-4)
    fixed = FORWARD(random, z[order], t, cond, jnp.asarray(False))
    assert np.abs(fixed[0] - here[0][order]).max() > 1e-2  # a site knows which one it is


def test_condition_positions_have_roles_and_null_hides_them(random):
    z, t, cond = example()
    here, _ = FORWARD(random, z, t, cond, jnp.asarray(False))
    swapped, _ = FORWARD(random, z, t, cond[::-1], jnp.asarray(False))
    assert np.abs(here - swapped).max() > 1e-2
    hidden, _ = FORWARD(random, z, t, cond, jnp.asarray(True))
    other, _ = FORWARD(random, z, t, cond[::-1], jnp.asarray(True))
    np.testing.assert_array_equal(hidden, other)
    scaled, _ = FORWARD(random, z, t, 3.0 * cond, jnp.asarray(False))
    np.testing.assert_allclose(scaled, here, rtol=1e-3, atol=1e-4)


def test_vmap_is_a_loop(random):
    many = [jnp.stack(x) for x in zip(example(0), example(1), strict=True)]
    flags = jnp.asarray([False, True])
    out, hidden = jax.jit(jax.vmap(dit.bind(MODEL), in_axes=(None, 0, 0, 0, 0)))(
        random, *many, flags
    )
    for i in range(2):
        one = FORWARD(random, *example(i), flags[i])
        np.testing.assert_allclose(out[i], one[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(hidden[i], one[1], rtol=1e-3, atol=1e-4)


def test_mean_pooling_without_context_and_roles_is_symmetric():
    model = dit.DiT(width=8, depth=1, heads=2, ratio=1, pool="mean", context=False)
    shapes = jax.eval_shape(lambda: dit.init(model, jax.random.key(0), (S, L), (C, E)))
    params = noise(shapes) | {"role": jnp.zeros((C, 8))}
    forward, (z, t, cond) = jax.jit(dit.bind(model)), example()
    here, hidden = forward(params, z, t, cond, jnp.asarray(False))
    there, _ = forward(params, z, t, cond[::-1], jnp.asarray(False))
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    assert hidden.shape == (S, 8)


def test_impossible_sizes_are_errors():
    with pytest.raises(ValueError, match=r"got 9.*heads=2"):
        dit.init(dit.DiT(width=9, heads=2), jax.random.key(0), (S, L), (C, E))
    with pytest.raises(ValueError, match=r"'max'.*'concat'"):
        dit.init(dit.DiT(width=8, heads=2, pool="max"), jax.random.key(0), (S, L), (C, E))

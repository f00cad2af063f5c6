"""Tokens: the layout by hand, the exact inverse, and every way to get it wrong."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.tokens import site_tokens as tokens

SHAPES = {  # two sites of different size, one stacked over 3 layers, one un-stacked
    "layers/q/kernel": {"a": (3, 5, 2), "b": (3, 2, 4)},
    "head/kernel": {"a": (4, 2), "b": (2, 3)},
}


def tree(seed=0, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        path: {name: jnp.asarray(rng.normal(size=s).astype(dtype)) for name, s in leaves.items()}
        for path, leaves in shapes.items()
    }


def same(x, y):
    return jax.tree.all(jax.tree.map(lambda u, v: bool(np.array_equal(u, v)), x, y))


def test_layout_against_numpy():
    x = tree()
    spec = tokens.from_tree(x)
    assert (spec.length, spec.dim) == (4, 18)
    np.testing.assert_array_equal(spec.types, [0, 1, 1, 1])  # sorted by path: head first
    np.testing.assert_array_equal(spec.layers, [0, 0, 1, 2])
    np.testing.assert_array_equal(spec.mask.sum(1), [14, 18, 18, 18])
    assert spec.names() == ("head/kernel", *(f"layers/q/kernel[{i}]" for i in range(3)))
    expected = np.zeros((4, 18), np.float32)
    expected[0, :14] = np.concatenate([np.ravel(x["head/kernel"][n]) for n in "ab"])
    for i in range(3):
        expected[1 + i] = np.concatenate([np.ravel(x["layers/q/kernel"][n][i]) for n in "ab"])
    np.testing.assert_array_equal(tokens.tokenise(spec, x), expected)


def test_exact_inverse_over_a_bank():
    bank = jax.tree.map(lambda *v: jnp.stack(v), *(tree(i) for i in range(3)))
    spec = tokens.from_tree(tree())
    x = jax.jit(jax.vmap(functools.partial(tokens.tokenise, spec)))(bank)
    assert x.shape == (3, 4, 18) and x.dtype == jnp.float32
    back = jax.vmap(functools.partial(tokens.detokenise, spec))(x)
    assert same(back, bank)
    # Mutation: rows of one site in the wrong order are seen.
    assert not same(jax.vmap(functools.partial(tokens.detokenise, spec))(x[:, ::-1]), bank)


def test_padding_is_not_read():
    spec = tokens.from_tree(tree())
    noisy = jnp.asarray(np.random.default_rng(1).normal(size=(4, 18)).astype("f4"))
    again = tokens.tokenise(spec, tokens.detokenise(spec, noisy))
    np.testing.assert_array_equal(again, np.where(spec.mask, noisy, 0))


def test_frozen_a_and_factors():
    x = {"q": {"b": tree()["layers/q/kernel"]["b"]}}
    frozen = {"q": {"a": tree()["layers/q/kernel"]["a"], "scale": jnp.ones(3)}}
    spec = tokens.from_tree(x)
    assert (spec.length, spec.dim) == (3, 8)
    ((a, b),) = tokens.factors(spec, tokens.tokenise(spec, x), frozen)
    np.testing.assert_array_equal(a, frozen["q"]["a"])
    np.testing.assert_array_equal(b, x["q"]["b"])
    with pytest.raises(ValueError, match=r"q: needs factors a and b, got \['b'\]"):
        tokens.factors(spec, tokens.tokenise(spec, x))


def test_adapter_knows_its_stack():
    """A vector leaf (a magnitude, say) is read right because the site declares its stack."""
    x = {"q": {"a": jnp.ones((3, 5, 2)), "m": jnp.ones((3, 4))}}
    adapter = SimpleNamespace(trainable=x, sites=((SimpleNamespace(path="q", stack=(3,)), None),))
    spec = tokens.from_adapter(adapter)
    assert (spec.length, spec.dim) == (3, 14)
    bank = jax.tree.map(lambda v: v[None], x)
    adapter.trainable = bank
    with pytest.raises(ValueError, match=r"q: leading axes .* expected the stack \(3,\)"):
        tokens.from_adapter(adapter)


def test_errors_name_path_got_and_expected():
    x = tree()
    spec = tokens.from_tree(x)
    assert hash(spec) == hash(tokens.from_tree(tree(1)))
    with pytest.raises(ValueError, match=r"missing \{'head/kernel'\}"):
        tokens.tokenise(spec, {"layers/q/kernel": x["layers/q/kernel"]})
    wrong = x | {"head/kernel": {"a": jnp.ones((4, 3)), "b": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"head/kernel/a: got float32\[4, 3\], expected"):
        tokens.tokenise(spec, wrong)
    with pytest.raises(ValueError, match=r"leaves \['b'\]"):
        tokens.tokenise(spec, x | {"head/kernel": {"b": jnp.ones((2, 3))}})
    with pytest.raises(ValueError, match=r"got \(4, 17\), expected \(4, 18\)"):
        tokens.detokenise(spec, jnp.ones((4, 17)))
    with pytest.raises(ValueError, match="share one dtype"):
        tokens.from_tree({"q": {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2), jnp.bfloat16)}})
    with pytest.raises(ValueError, match="expected a matrix"):
        tokens.from_tree({"q": {"a": jnp.ones(2)}})
    with pytest.raises(ValueError, match="nothing to make tokens of"):
        tokens.from_tree({"q": {}})

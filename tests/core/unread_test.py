"""An adapter's weight that a function never reads is an error that names it, or is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.methods.selective.bitfit import BitFit

PARAMS = {
    "up": jnp.ones((4, 4)),
    "down": jnp.ones((4, 4)),
    "layers": jnp.ones((2, 4, 4)),
    "bias": jnp.ones(4),
}
X = jnp.ones((3, 4))


def model(p, x):
    x = jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None]
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]


def cast(p):
    """Mixed precision: every weight is touched, used or not."""
    return jax.tree.map(lambda t: t.astype(jnp.bfloat16).astype(t.dtype), p)


def without(name):
    """The model on copies of `name`."""
    return lambda p, x: model({**p, name: PARAMS[name]}, x)


FORMS = {
    "closure": without("down"),
    "closure, cast": lambda p, x: without("down")(cast(p), x),
    "closure in jit": lambda p, x: jax.jit(without("down"))(p, x),
    "closure in remat": lambda p, x: jax.checkpoint(without("down"))(p, x),
    "closure in a scan": lambda p, x: lax.scan(
        lambda h, _: (without("down")(p, h), None), x, None, length=2
    )[0],
    "closure in a branch": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda p: without("down")(p, x), lambda p: x, p
    ),
    "handed on by jit": lambda p, x: (lambda q: without("down")(q, x))(
        jax.jit(lambda p: dict(p))(p)
    ),
}


@pytest.fixture(scope="module")
def adapter():
    methods = {"up|down|layers": jl.LoRA(2)}
    a = jl.init(jax.random.key(0), model, PARAMS, X, methods=methods)
    return a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))


@pytest.mark.parametrize("form", FORMS)
def test_one_weight_that_is_not_read(adapter, form):
    text = "does not read 1 of the adapter's 3 weights: down. .*closure.*unread='allow'"
    with pytest.raises(ValueError, match=text):
        jax.jit(jl.lift(FORMS[form]))(PARAMS, adapter, X)
    y = jl.lift(FORMS[form], unread="allow")(PARAMS, adapter, X)
    expected = FORMS[form](jl.merge(PARAMS, adapter), X)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    assert np.abs(y - FORMS[form](PARAMS, X)).max() > 1e-4


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jax.jit(lambda p, x: model(cast(p), x))(p, x),
        lambda p, x: jax.checkpoint(model)(p, x),
        lambda p, x: lax.cond(x[0, 0] > 0, lambda p: model(p, x), lambda p: x, p),
        lambda p, x: lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, model(p, s[1])), (0, x)
        )[1],
        lambda p, x: (x @ p["up"], model(p, x))[1],  # computed, and not returned
    ],
    ids=["jit", "remat", "cond", "while", "dead"],
)
def test_all_that_is_read_is_found(adapter, fn):
    np.testing.assert_allclose(
        jl.lift(fn)(PARAMS, adapter, X), fn(jl.merge(PARAMS, adapter), X), rtol=1e-5
    )


def test_a_weight_that_is_computed_with_in_vain_counts_as_read():
    """`jl.sites` lists it, so `init` and `lift` of one function agree."""

    def fn(p, x):
        jax.jit(lambda w: x @ w)(p["up"])
        return x @ p["down"]

    a = jl.init(jax.random.key(0), fn, PARAMS, X, methods={"all-linear": jl.LoRA(2)})
    assert [s.path for s, _ in a.sites] == ["down", "up"]
    jl.lift(fn)(PARAMS, a, X)


def test_biases_count():
    a = jl.init(jax.random.key(0), model, PARAMS, X, methods={"bias": BitFit(), "up": jl.LoRA(2)})
    with pytest.raises(ValueError, match="does not read 1 of the adapter's 2 weights: bias"):
        jl.lift(without("bias"))(PARAMS, a, X)


def test_a_function_of_copies_alone_and_no_adapter(adapter):
    def fn(p, x):
        return model(PARAMS, x)

    with pytest.raises(ValueError, match="3 of the adapter's 3 weights: down, layers, up"):
        jl.lift(fn)(PARAMS, adapter, X)
    np.testing.assert_array_equal(jl.lift(fn)(PARAMS, {}, X), fn(PARAMS, X))
    with pytest.raises(ValueError, match="unread: got 'merge', expected 'error' or 'allow'"):
        jl.lift(fn, unread="merge")

"""L10: a weight that cannot stay lazy is an error naming path, primitive and line; and ways out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas

import jlora as jl


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = leaf(3, 4, seed=1)
W = {"block": {"w": leaf(4, 4)}}


@jax.custom_vjp
def product(w, x):
    return x @ w


product.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda saved, g: (saved[1].T @ g, g @ saved[0].T),
)


def in_kernel(w, x):
    def kernel(w, x, y):
        y[...] = x[...] @ w[...]

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(w, x)


CASES = {
    "pallas_call": in_kernel,
    "mul": lambda w, x: x @ (w * jnp.eye(4)),
    "select_n": lambda w, x: x @ jnp.where(jnp.eye(4) > 0, w, 0.0),
    "tanh": lambda w, x: x @ jnp.tanh(w),
    "reduce_sum": lambda w, x: x * jnp.sum(w),
    "custom_vjp_call": product,
    "scan": lambda w, x: lax.scan(lambda h, row: (h * row, None), x[0], w)[0],
}


@pytest.mark.parametrize("primitive", CASES)
def test_errors_name_path_primitive_and_line(primitive):
    def fn(p, x):
        return CASES[primitive](p["block"]["w"], x)

    a = jl.init(
        jax.random.key(0), lambda p, x: x @ p["block"]["w"], W, X, methods={"w": jl.LoRA(2)}
    )
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))
    with pytest.raises(jl.DenseWeightError) as error:
        jax.jit(jl.lift(fn))(W, a, X)
    text = str(error.value)
    assert "block/w (4, 4)" in text and f"'{primitive}" in text
    assert "errors_test.py:" in text and "on_dense='merge'" in text
    np.testing.assert_allclose(
        jl.lift(fn, on_dense="merge")(W, a, X), fn(jl.merge(W, a), X), rtol=1e-5, atol=1e-5
    )


def test_the_line_is_that_of_the_operation():
    def fn(p, x):
        h = x @ p["block"]["w"]
        w = jnp.sin(p["block"]["w"])  # this one
        return h @ w

    a = jl.init(
        jax.random.key(0), lambda p, x: x @ p["block"]["w"], W, X, methods={"w": jl.LoRA(2)}
    )
    line = fn.__code__.co_firstlineno + 2
    with pytest.raises(jl.DenseWeightError, match=rf"'sin' at \S*errors_test.py:{line}\b"):
        jl.lift(fn)(W, a, X)


def test_returning_a_weight_is_an_error():
    a = jl.init(
        jax.random.key(0), lambda p, x: x @ p["block"]["w"], W, X, methods={"w": jl.LoRA(2)}
    )
    with pytest.raises(jl.DenseWeightError, match=r"block/w.*returning it needs the merged weight"):
        jl.lift(lambda p, x: p["block"]["w"])(W, a, X)


def test_a_stack_sliced_along_its_matrix_is_a_view():
    """A slice that a wrong axis would make right by its shape."""
    params = {"w": leaf(3, 4, 4)}
    a = jl.init(jax.random.key(0), lambda p, x: x @ p["w"][0], params, X, methods={"w": jl.LoRA(2)})
    assert a.sites[0][0].kinds == "sio"
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))
    fn = lambda p, x: x @ p["w"][:, 0:3, :][0].T  # noqa: E731
    np.testing.assert_allclose(
        jl.lift(fn)(params, a, X), fn(jl.merge(params, a), X), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_of_another_model():
    a = jl.init(
        jax.random.key(0), lambda p, x: x @ p["block"]["w"], W, X, methods={"w": jl.LoRA(2)}
    )
    run = jl.lift(lambda p, x: x @ p["blocks"]["w"])
    with pytest.raises(ValueError, match=r"site block/w is not in params; nearest: \['blocks/w'\]"):
        run({"blocks": W["block"]}, a, X)
    with pytest.raises(ValueError, match=r"block/w: got shape \(4, 5\), expected \(4, 4\)"):
        jl.merge({"block": {"w": leaf(4, 5)}}, a)
    with pytest.raises(ValueError, match="on_dense: got 'allow'"):
        jl.lift(lambda p, x: x, on_dense="allow")


def test_a_forgotten_adapter():
    def fn(p, x):
        return x @ p["block"]["w"]

    text = r"adapter: got ArrayImpl of shape \(3, 4\), expected an Adapter.*tuned\(params, adapter"
    with pytest.raises(TypeError, match=text):
        jl.lift(fn)(W, X)
    with pytest.raises(TypeError, match="adapter: got dict, expected an Adapter"):
        jl.merge(W, {"block": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"methods: got LoRA\(.*expected \{'all-linear': LoRA"):
        jl.init(jax.random.key(0), fn, W, X, methods=jl.LoRA(2))  # type: ignore[arg-type]


def test_reports_from_a_while_loop_are_refused():
    class Told(jl.LoRA):
        def apply(self, x, w, p, ctx):
            return super().apply(x, w, p, ctx), {"size": jnp.sum(x)}

    def fn(p, x):
        return lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ p["block"]["w"]), (0, x)
        )[1]

    a = jl.init(jax.random.key(0), fn, W, X, methods={"w": Told(2)})
    assert jl.lift(fn)(W, a, X).shape == X.shape
    with pytest.raises(ValueError, match=r"\['block/w'\] report inside a while loop"):
        jl.lift(fn, aux=True)(W, a, X)


def test_a_delta_that_depends_on_x_cannot_be_transposed():
    class Gated(jl.Method):
        def init(self, key, site, context):
            return {"g": jnp.ones((site.d_in, 1))}, {}

        def apply(self, x, w, p, ctx):
            return x @ w * jax.nn.sigmoid(x @ p["g"])

    params, ids = {"w": leaf(4, 4)}, np.array([0, 1], np.int32)

    def fn(p, ids):
        return p["w"][ids] @ p["w"].T

    a = jl.init(jax.random.key(0), fn, params, ids, methods={"w": Gated()})
    with pytest.raises(jl.DenseWeightError, match="dot_general"):
        jl.lift(fn)(params, a, ids)


def test_a_product_that_sums_over_a_stack_axis_says_how_it_must_be_used():
    params, x = {"w": jnp.ones((3, 4, 5))}, jnp.ones((3, 2, 4))
    methods = {"w": jl.LoRA(2)}

    def apart(p, x):
        return jnp.einsum("etd,edf->etf", x, p["w"])

    adapter = jl.init(jax.random.key(0), apart, params, x, methods=methods)
    summed = jl.lift(lambda p, x: jnp.einsum("etd,edf->tf", x, p["w"]))
    with pytest.raises(
        jl.DenseWeightError, match=r"errors_test.*axes as the adapter has them, 'sio'"
    ):
        summed(params, adapter, x)

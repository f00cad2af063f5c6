"""Weights that an operation hides or needs merged: named and refused, or merged where allowed.

Quantisers of training write custom_vjp functions, quantised weights are integer codes, experts on a
TPU run in Pallas kernels. The first half has their forms by hand, the second half the real ones.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

import jlora as jl


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = leaf(3, 4, seed=1)


def rounded(w, scale):
    """Codes of 8 bits, and back."""
    return jnp.round(w / scale).astype(jnp.int8).astype(w.dtype) * scale


@jax.custom_vjp
def straight_through(w):
    return rounded(w, jnp.max(jnp.abs(w), 0, keepdims=True) / 127)


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, g: (g,))


@jax.custom_vjp
def quantised_product(x, w, top):
    return x @ rounded(w, top / 127)


quantised_product.defvjp(
    lambda x, w, top: (quantised_product(x, w, top), (x, w)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g, jnp.zeros((1, g.shape[1]), g.dtype)),
)


def as_qwix(w, x):
    return quantised_product(x, w, jnp.max(jnp.abs(w), 0, keepdims=True))


@jax.custom_jvp
def product(x, w):
    return x @ w


@product.defjvp
def product_jvp(at, along):
    (x, w), (dx, dw) = at, along
    return product(x, w), product(dx, w) + product(x, dw)


def as_fp8(w, x):
    """Flax's: the operands pass a quantiser, the product has a gradient of its own."""
    return product(x, straight_through(w))


def kernel(x, w, y):
    y[...] = x[...] @ w[...]


def in_pallas(w, x):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


HIDDEN = {  # name -> (function, what needs the merged weight)
    "a quantiser before a matmul": (lambda w, x: x @ straight_through(w), "custom_vjp_call"),
    "a quantised matmul": (as_qwix, "custom_vjp_call"),
    "a matmul with a gradient of its own": (lambda w, x: product(x, w), "custom_jvp_call"),
    "both": (as_fp8, "custom_vjp_call"),
    "a kernel": (in_pallas, "pallas_call"),
    "a mask": (lambda w, x: x @ jnp.where(w > 0, w, 0.0), "select_n"),
}


def checked(fn, params, x, path, op, gradient=True):
    """Named and refused, in `init` and `lift`; with on_dense='merge' equal to merging."""
    methods = {"all-linear": jl.LoRA(2)}
    with pytest.raises(
        ValueError, match=rf"(?s)all weights:\n  {path}.*'{op}' at .*on_dense='merge'"
    ):
        jl.init(jax.random.key(0), fn, params, x, methods=methods)
    a = jl.init(jax.random.key(0), fn, params, x, methods=methods, on_dense="merge")
    assert [(s.path, s.kinds) for s, _ in a.sites] == [(path, "io")]
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.3, a.trainable))
    with pytest.raises(jl.DenseWeightError, match=rf"{path} .*needs the merged weight"):
        jl.lift(fn)(params, a, x)

    def loss(run, t):
        y = run(params, a.replace(trainable=t), x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    def merged(p, a, x):
        return fn(jl.merge(p, a), x)

    runs = [functools.partial(loss, run) for run in (jl.lift(fn, on_dense="merge"), merged)]
    if not gradient:
        np.testing.assert_allclose(*(run(a.trainable)[1] for run in runs), rtol=1e-6)
        return
    (g1, y1), (g2, y2) = (jax.jit(jax.grad(run, has_aux=True))(a.trainable) for run in runs)
    np.testing.assert_allclose(y1, y2, rtol=1e-6, atol=1e-6)
    for k in "ab":
        np.testing.assert_allclose(g1[path][k], g2[path][k], rtol=1e-5, atol=1e-5)
        assert np.abs(g2[path][k]).max() > 1e-3


@pytest.mark.parametrize("form", HIDDEN)
def test_what_hides_a_weight_is_named(form):
    use, op = HIDDEN[form]
    checked(lambda p, x: use(p["w"], x), {"w": leaf(4, 6)}, X, "w", op, form != "a kernel")


def test_a_stack_in_a_kernel_is_taken_as_the_usual_layout():
    def fn(p, x):
        return in_pallas(p["w"].reshape(4, 8), x)

    def by_slices(p, x):
        shape = jax.ShapeDtypeStruct((2, 3, 4), x.dtype)

        def experts(x, w, y):
            y[...] = jnp.einsum("ti,eio->eto", x[...], w[...])

        return pallas.pallas_call(experts, out_shape=shape, interpret=True)(x, p["w"])

    params, methods = {"w": leaf(2, 4, 4)}, {"w": jl.LoRA(2)}
    with pytest.raises(ValueError, match=r"consumes whole: \['w \(pallas_call\)'\]"):
        jl.init(jax.random.key(0), by_slices, params, X, methods=methods)
    for form in (fn, by_slices):
        a = jl.init(jax.random.key(0), form, params, X, methods=methods, on_dense="merge")
        assert a.sites[0][0].kinds == "sio"
        assert jl.lift(form, on_dense="merge")(params, a, X).size


def codes(p, x):
    return (x @ (p["codes"].astype(jnp.float32) * p["scale"])) @ p["v"]


@pytest.mark.parametrize("on_dense", ["error", "merge"])
@pytest.mark.parametrize("pattern", ["all-linear", "codes|v"])
def test_integer_codes_are_named(pattern, on_dense):
    """Weights of quantisers after training; nothing can be added to 8 bits, merged or not."""
    params = {
        "codes": jnp.ones((4, 6), jnp.int8),
        "scale": leaf(1, 6),
        "v": leaf(6, 2),
        "positions": jnp.zeros((2, 3), jnp.int8),  # no weight
    }

    def fn(p, x):
        return codes(p, x) + p["positions"].sum().astype(x.dtype)

    def made(methods):
        return jl.init(jax.random.key(0), fn, params, X, methods=methods, on_dense=on_dense)

    text = (
        r"(?s)codes of quantised.*\n  codes \(4, 6\): dot \(gain\); holds int8 codes\n.*jl.quantize"
    )
    with pytest.raises(ValueError, match=text):
        made({pattern: jl.LoRA(2)})
    assert [s.path for s, _ in made({"codes": None, pattern: jl.LoRA(2)}).sites] == ["v"]


def test_an_adapter_of_a_matrix_does_not_fit_its_codes():
    def fn(p, x):
        return x @ p["w"].astype(x.dtype)

    a = jl.init(jax.random.key(0), fn, {"w": leaf(4, 6)}, X, methods={"w": jl.LoRA(2)})
    params = {"w": jnp.ones((4, 6), jnp.int8)}
    for run in (lambda: jl.merge(params, a), lambda: jl.lift(fn)(params, a, X)):
        with pytest.raises(ValueError, match="w: got int8, expected a floating array"):
            run()


# The real ones.

theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@theirs
@pytest.mark.parametrize("name", ["Fp8DotGeneralOp", "Fp8DirectDotGeneralOp"])
def test_flax_fp8(name):
    module = nn.Dense(6, use_bias=False, dot_general_cls=getattr(nn, name))
    params = module.init(jax.random.key(0), X)
    checked(module.apply, params, X, "params/kernel", "custom_vjp_call")


@theirs
def test_qwix_in_training():
    qwix = pytest.importorskip("qwix")
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)]
    dense = nn.Dense(6, use_bias=False)
    module = qwix.quantize_model(dense, qwix.QtProvider(rules))
    checked(module.apply, dense.init(jax.random.key(0), X), X, "params/kernel", "custom_vjp_call")


@theirs
def test_qwix_after_training():
    qwix = pytest.importorskip("qwix")
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)]
    dense = nn.Dense(6, use_bias=False)
    plain = dense.init(jax.random.key(0), X)["params"]
    module = qwix.quantize_model(dense, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    params = {"params": qwix.quantize_params(plain, abstract)}
    with pytest.raises(ValueError, match=r"kernel/array/qvalue \(4, 6\): dot .*holds int8 codes"):
        jl.init(jax.random.key(0), module.apply, params, X, methods={"all-linear": jl.LoRA(2)})


@theirs
def test_haliax():
    hax, eqx = pytest.importorskip("haliax"), pytest.importorskip("equinox")
    rows, a, b = hax.Axis("rows", 3), hax.Axis("a", 4), hax.Axis("b", 6)
    linear = hax.nn.Linear.init(a, b, key=jax.random.key(0), use_bias=False)
    params, rest = eqx.partition(linear, eqx.is_array)
    x = hax.named(X, (rows, a))

    def fn(p, x, by):
        layer = eqx.combine(p, rest)
        return (layer(x) + hax.dot(x, layer.weight * by, axis=a)).array

    made = jl.init(jax.random.key(0), fn, params, x, 0.5, methods={"all-linear": jl.LoRA(2)})
    made = made.replace(trainable=jax.tree.map(lambda t: t + 0.3, made.trainable))
    y = jl.lift(fn)(params, made, x, 0.5)
    np.testing.assert_allclose(y, fn(jl.merge(params, made), x, 0.5), rtol=1e-5)

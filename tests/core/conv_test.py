"""Convolutions whose kernel is transposed, or one of a stack under vmap."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from tests.core.views_test import METHODS, check, compared, w

X = w(2, 5, 4, seed=0)  # [batch, width, channels in]
STEPS = {"NWC": ("NWC", "WIO", "NWC"), "NCW": ("NCW", "OIW", "NCW")}
UP = nn.ConvTranspose(6, (3, 2), (2, 1), kernel_dilation=(1, 2), transpose_kernel=True)
UP_FLIPPED = nn.ConvTranspose(6, (3, 2), (2, 1), kernel_dilation=(1, 2))


def up(kernel, x, stride=2, padding="SAME", dilation=1, transposed=True):
    return lax.conv_transpose(
        x, kernel, (stride,), padding, (dilation,), STEPS["NWC"], transpose_kernel=transposed
    )


TRANSPOSED = {  # name -> (function of (kernel, x), shape of the kernel)
    "one step": (functools.partial(up, stride=1), (3, 6, 4)),
    "two steps": (up, (3, 6, 4)),
    "no padding, dilated": (functools.partial(up, padding="VALID", dilation=2), (3, 6, 4)),
    "kernel as it is": (functools.partial(up, transposed=False), (3, 4, 6)),
    "Linen": (
        lambda k, x: UP.apply({"params": {"kernel": k, "bias": jnp.zeros(6)}}, x[:, None]),
        (3, 2, 6, 4),
    ),
    "Linen, kernel as it is": (
        lambda k, x: UP_FLIPPED.apply({"params": {"kernel": k, "bias": jnp.zeros(6)}}, x[:, None]),
        (3, 2, 4, 6),
    ),
}


def conv(kernel, x, stride=1, layout="NWC", groups=1):
    return lax.conv_general_dilated(
        x, kernel, (stride,), "SAME", dimension_numbers=STEPS[layout], feature_group_count=groups
    )


PAIR = w(2, 2, 5, 4, seed=3)  # of two models
MAPPED = {  # name -> (function, shape, kinds): kernels of a stack each on its own x, or on one
    "each its own": (lambda k, x: jax.vmap(conv)(k, PAIR * x[0, 0, 0]), (2, 3, 4, 6), "siio"),
    "on one x": (lambda k, x: jax.vmap(lambda k: conv(k, x))(k), (2, 3, 4, 6), "oiio"),
    "stack in the middle": (
        lambda k, x: jax.vmap(conv, in_axes=(1, 0))(k, PAIR * x[0, 0, 0]),
        (3, 2, 4, 6),
        "isio",
    ),
    "channels first": (
        lambda k, x: jax.vmap(functools.partial(conv, layout="NCW", stride=2))(
            k, jnp.swapaxes(PAIR, 2, 3) * x[0, 0, 0]
        ),
        (2, 6, 4, 3),
        "soii",
    ),
    "grouped": (
        lambda k, x: jax.vmap(functools.partial(conv, groups=2))(k, PAIR * x[0, 0, 0]),
        (2, 3, 2, 6),
        "siio",
    ),
    "depthwise": (lambda k, x: conv(k.reshape(3, 1, 8), x, groups=4), (3, 4, 2), "ioo"),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def equal(forms, method):
    def fn(p, x):
        return {name: form[0](p[name], x) for name, form in forms.items()}

    params = {name: w(*form[1]) for name, form in forms.items()}
    adapter, found = compared(fn, params, {"": METHODS[method]}, X)
    check(found)
    return {site.path: site.kinds for site, _ in adapter.sites}


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoKr"])
def test_transposed_kernels(method):
    names = list(TRANSPOSED) if method == "LoRA" else ["two steps", "kernel as it is"]
    kinds = equal({name: TRANSPOSED[name] for name in names}, method)
    assert kinds["two steps"] == "ioi" and kinds["kernel as it is"] == "iio"


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_kernels_of_a_stack(method):
    assert equal(MAPPED, method) == {name: kinds for name, (_, _, kinds) in MAPPED.items()}


def test_a_stack_of_kernels_by_an_adapter_that_names_it():
    """Made for one kernel after another, used under vmap on one x."""

    def apart(p, x):
        return [conv(k, x) for k in p["k"]]

    def mapped(p, x):
        return jax.vmap(lambda k: conv(k, x))(p["k"])

    params, x = {"k": jnp.asarray(w(2, 3, 4, 6))}, jnp.asarray(X)
    a = jl.init(jax.random.key(0), apart, params, x, methods={"k": jl.LoRA(2)})
    assert a.sites[0][0].kinds == "siio"
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))
    y = jl.lift(mapped)(params, a, x)
    np.testing.assert_allclose(y, mapped(jl.merge(params, a), x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(y, jnp.stack(jl.lift(apart)(params, a, x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [True, False])
def test_the_numbers_of_torch(transposed):
    """The delta by numpy, the operation by torch, in float64."""
    torch = pytest.importorskip("torch", reason="torch is a test-only requirement (Python 3.11)")
    kernel = w(3, 6, 4) if transposed else w(3, 4, 6)

    def fn(p, x):
        return up(p["k"], x, padding="VALID", transposed=transposed)

    params, x = {"k": jnp.asarray(kernel)}, jnp.asarray(X)
    adapter = jl.init(jax.random.key(0), fn, params, x, methods={"k": jl.LoRA(2, 6.0)})
    a, b = w(12, 2, seed=4), w(2, 6, seed=5)
    adapter = adapter.replace(trainable={"k": {"a": jnp.asarray(a), "b": jnp.asarray(b)}})
    delta = (3.0 * a @ b).reshape(3, 4, 6)  # [width, in, out]
    if transposed:
        full = (kernel + delta.transpose(0, 2, 1)).transpose(2, 1, 0)  # torch's [in, out, width]
    else:
        full = (kernel + delta).transpose(1, 2, 0)[..., ::-1]
    expected = torch.nn.functional.conv_transpose1d(
        torch.tensor(X.transpose(0, 2, 1)), torch.tensor(full.copy()), stride=2
    )
    got = jl.lift(fn)(params, adapter, x)
    np.testing.assert_allclose(got, expected.numpy().transpose(0, 2, 1), rtol=1e-12, atol=1e-12)

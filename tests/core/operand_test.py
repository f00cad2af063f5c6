"""What a method may do with x and w, on every kind of use: dense products, lookups, patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl


def w(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])


X = w(3, 5, 6, seed=0)
IDS = np.array([[0, 3, 1], [2, 2, 5]], np.int32)


@dataclasses.dataclass(frozen=True)
class MergeOnly(jl.Method):
    """W' = W * (1 + v): no fast path."""

    def init(self, key, site, context):
        return {"v": jnp.zeros((site.d_in, site.d_out), site.param_dtype)}, {}

    def merge(self, w, p):
        return w * (1 + p["v"])


@dataclasses.dataclass(frozen=True)
class Scaled(jl.Method):
    """W' = diag(1 + l) W, by scaling x."""

    def init(self, key, site, context):
        return {"l": jnp.zeros(site.d_in, site.param_dtype)}, {}

    def merge(self, w, p):
        return (1 + p["l"])[:, None] * w

    def apply(self, x, w, p, ctx):
        x = jnp.asarray(x)
        return (x * (1 + p["l"]).reshape((1,) * (x.ndim - 1) + (-1,))) @ w


@dataclasses.dataclass(frozen=True)
class Rotated(jl.Method):
    """W' = (I + R) W, by multiplying x."""

    def init(self, key, site, context):
        return {"r": jnp.zeros((site.d_in, site.d_in), site.param_dtype)}, {}

    def merge(self, w, p):
        return w + p["r"] @ w

    def apply(self, x, w, p, ctx):
        return (x @ (jnp.eye(len(p["r"]), dtype=x.dtype) + p["r"])) @ w


@dataclasses.dataclass(frozen=True)
class Normed(jl.Method):
    """W' = (W + U V) with the column norms of W; reads the weight, scales y."""

    def init(self, key, site, context):
        u = jax.random.normal(key, (site.d_in, 2), site.param_dtype)
        v = jnp.zeros((2, site.d_out), site.param_dtype)
        return {"u": u, "v": v}, {"norm": jnp.linalg.norm(context.weight(), axis=0)}

    def merge(self, w, p):
        full = w + p["u"] @ p["v"]
        return full / jnp.linalg.norm(full, axis=0, keepdims=True) * p["norm"][None]

    def apply(self, x, w, p, ctx):
        norm = jnp.linalg.norm(w.dense() + p["u"] @ p["v"], axis=0)
        y = x @ w + x @ p["u"] @ p["v"]
        return y * (p["norm"] / norm).reshape((1,) * (y.ndim - 1) + (-1,))


def conv(**options):
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        x = x.reshape(3, 3, 5, 2)
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, **options
        )

    return fn


USES = {
    "dense": (lambda p, x: jnp.tanh(x @ p["w"]), w(6, 7)),
    "left": (lambda p, x: jnp.einsum("nhd,btd->bnth", p["w"], x), w(2, 4, 6)),
    "scan": (lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0], w(2, 6, 6)),
    "experts": (lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]), w(3, 6, 4)),
    "lookup": (lambda p, x: p["w"][IDS], w(6, 4)),
    "tied": (lambda p, x: p["w"][IDS] @ p["w"].T, w(6, 4)),
    "patches": (conv(), w(2, 3, 2, 4)),
    "patches in groups": (conv(feature_group_count=2), w(2, 3, 1, 4)),
}
METHODS = {m.__name__: m for m in (MergeOnly, Scaled, Rotated, Normed)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use", USES)
def test_methods_on_every_use(law, use, method):
    fn, weight = USES[use]
    law(fn, {"w": weight}, {"w": METHODS[method]()}, X, structural=False)

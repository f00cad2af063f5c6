"""What is computed in float32 asks for float32: XLA's accelerators round operands otherwise.

Read from the program that XLA is given, so that no accelerator is needed.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from tests.core.conftest import noisy

X = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
METHODS = {
    "LoRA": jl.LoRA(2),
    "LoRA, wide": jl.LoRA(20),  # merged by a matmul, where thin factors are a sum
    "DoRA": jl.DoRA(2),
    "Decomposed": jl.Decomposed(jl.LoRA(2), by="in"),
    "LoKr": jl.LoKr(2),
    "OFT": jl.OFT(4),
    "HiRA": jl.HiRA(2),
}


def model(p, x):
    return x @ p["w"]


def made(method):
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(24, 24)), jnp.float32)}
    a = jl.init(jax.random.key(0), model, params, X, methods={"w": method})
    return params, a.replace(trainable=noisy(a.trainable))


def products(fn, *args):
    """Of the products in the program for `fn(*args)`: (its shapes, whether in full precision)."""
    text = jax.jit(fn).lower(*args).as_text()
    lines = re.findall(r"stablehlo\.dot_general .*", text)
    return [(re.findall(r"tensor<(.*?)>", t), "precision = [HIGHEST, HIGHEST]" in t) for t in lines]


@pytest.mark.parametrize("method", METHODS)
def test_merging_and_its_gradient(method):
    """Also where JAX differentiates a program that it has traced before."""
    params, a = made(METHODS[method])

    @jax.jit
    def total(t):
        return jnp.sum(jnp.sin(jl.merge(params, a.replace(trainable=t))["w"]))

    for fn in (total, jax.grad(total)):
        found = products(fn, a.trainable)
        assert all(full for _, full in found), found
    assert method != "LoRA, wide" or products(total, a.trainable)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_in_full_and_activations_as_the_model_has_them(dtype):
    """DoRA: what has rows of x is the model's own precision, the norms are not."""
    params, a = made(jl.DoRA(2))
    params, x = jax.tree.map(lambda t: t.astype(dtype), (params, jnp.asarray(X)))
    found = products(jl.lift(model), params, a, x)
    activations = [full for shapes, full in found if shapes[0].startswith("3x")]
    norms = [(shapes, full) for shapes, full in found if not shapes[0].startswith("3x")]
    assert len(activations) == 3 and not any(activations), found  # x W, x A, (x A) B
    assert len(norms) >= 4 and all(full for _, full in norms), norms
    assert all("xf32" in shape for shapes, _ in norms for shape in shapes), norms

"""LoCon with a core against three convolutions in a row, and against LoRA where it is LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank.locon import LoCon

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 4)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 4, 5)), jnp.float32)
LAYOUTS = {"flax": ("NHWC", "HWIO", "NHWC"), "torch": ("NCHW", "OIHW", "NCHW")}


def model(p, x, layout="flax"):
    return jax.lax.conv_general_dilated(
        x, p["w"], (2, 1), ((1, 1), (0, 0)), dimension_numbers=LAYOUTS[layout]
    )


def made(layout, method, seed=2):
    """(params, x, an adapter with noise everywhere)."""
    to = (lambda t, order: t) if layout == "flax" else jnp.transpose
    params, x = {"w": to(KERNEL, (3, 2, 0, 1))}, to(X, (0, 3, 1, 2))
    fresh = jl.init(
        jax.random.key(seed), lambda p, x: model(p, x, layout), params, x, methods={"w": method}
    )
    leaves, tree = jax.tree.flatten(fresh.trainable)
    draw = np.random.default_rng(seed)
    noisy = [t + jnp.asarray(draw.normal(size=t.shape), t.dtype) for t in leaves]
    return params, x, fresh.replace(trainable=jax.tree.unflatten(tree, noisy))


def check_value(layout):
    """A 1 x 1 convolution, the core's, and another 1 x 1, written out in numpy."""
    params, x, adapter = made(layout, LoCon(rank=2, alpha=6.0))
    t = {k: np.float64(v) for k, v in adapter.trainable["w"].items()}
    core = t["t"].reshape(3, 2, 2, 2)  # the window before the channels, or after them
    assert t["t"].shape == ((6, 1, 2, 2) if layout == "flax" else (1, 6, 2, 2))
    h = np.pad(np.float64(X) @ t["a"], ((0, 0), (1, 1), (0, 0), (0, 0)))
    y = np.zeros((2, 4, 5, 2))
    for i in range(4):
        for j in range(5):
            y[:, i, j] = np.einsum("bklr,klrs->bs", h[:, 2 * i : 2 * i + 3, j : j + 2], core)
    delta = 3.0 * y @ t["b"]
    base = model({"w": KERNEL}, X)
    for got in (
        jl.lift(lambda p, x: model(p, x, layout))(params, adapter, x),
        model(jl.merge(params, adapter), x, layout),
    ):
        got = got if layout == "flax" else jnp.transpose(got, (0, 2, 3, 1))
        np.testing.assert_allclose(got - base, delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value(layout):
    check_value(layout)


def test_it_begins_as_the_base_and_has_fewer_parameters_than_lora():
    params, x, _ = made("flax", LoCon(rank=2))
    fresh = jl.init(jax.random.key(0), model, params, x, methods={"w": LoCon(rank=2)})
    np.testing.assert_array_equal(jl.merge(params, fresh)["w"], params["w"])
    count = sum(t.size for t in jax.tree.leaves(fresh.trainable))
    assert count == 2 * (4 + 2 * 6 + 5) < 2 * (4 * 6 + 5)  # r (channels + r window + d_out)


def test_limit_a_window_of_one_place_is_lora():
    def matrix(p, x):
        return x @ p["w"]

    params, x = {"w": KERNEL[0, 0]}, X
    locon, lora = (
        jl.init(jax.random.key(0), matrix, params, x, methods={"w": m})
        for m in (LoCon(rank=2, alpha=3.0), jl.LoRA(rank=2, alpha=3.0))
    )
    same = {"w": {"a": lora.trainable["w"]["a"] + 1, "b": lora.trainable["w"]["b"] + 1}}
    assert jax.tree.map(jnp.shape, locon.trainable) == jax.tree.map(jnp.shape, same)
    got, want = (jl.merge(params, a.replace(trainable=same))["w"] for a in (locon, lora))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_claim_a_kernel_with_one_window_for_all_is_found():
    """The paper's: fewer parameters for the same. A delta of Tucker form is fitted by gradient."""
    params, x, target = made("flax", LoCon(rank=1, alpha=1.0), seed=5)
    want = model(jl.merge(params, target), x)
    _, _, adapter = made("flax", LoCon(rank=1, alpha=1.0), seed=6)

    def loss(trainable):
        y = jl.lift(model)(params, adapter.replace(trainable=trainable), x)
        return jnp.mean((y - want) ** 2)

    @jax.jit
    def step(trainable, _):
        value, slope = jax.value_and_grad(loss)(trainable)
        return jax.tree.map(lambda t, g: t - 0.02 * g, trainable, slope), value

    _, values = jax.lax.scan(step, adapter.trainable, None, length=1500)
    assert values[-1] < 1e-3 * values[0], (values[0], values[-1])


def test_refusals():
    with pytest.raises(ValueError, match=r"LoCon\.rank: got 0, expected an integer of at least 1"):
        LoCon(rank=0)


def test_mutation_a_core_turned_round_is_seen(monkeypatch):
    good = LoCon.factors
    monkeypatch.setattr(
        LoCon, "factors", lambda self, p: good(self, {**p, "t": p["t"].swapaxes(2, 3)})
    )
    with pytest.raises(AssertionError):
        check_value("flax")

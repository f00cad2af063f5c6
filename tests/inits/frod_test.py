"""FRoD's joint basis: PEFT's own up to signs, and what it is for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.inits.frod import joint_basis
from jlora.io import safetensors_file
from jlora.methods import FRoD

GOLDEN = Path(__file__).parents[2] / "third_party" / "peft_types"


def check_peft(basis):
    """Every column is PEFT's or its negative; of `up`, whose eigenvalues are distinct."""
    state, _ = safetensors_file.read(GOLDEN / "base.safetensors")
    theirs, _ = safetensors_file.read(GOLDEN / "frod" / "adapter_model.safetensors")
    got = basis([state[f"layer.{i}.up.weight"].T for i in range(2)])
    want = theirs["base_model.frod_V.up"]
    np.testing.assert_allclose(got * np.sign((got * want).sum(0))[None], want, atol=1e-4)


def test_the_basis_is_that_of_peft():
    check_peft(joint_basis)


def test_mutation_a_basis_of_one_layer_is_seen():
    with pytest.raises(AssertionError):
        check_peft(lambda weights: joint_basis(weights[:1]))


def fresh(world, methods):
    key = jax.random.key(0)
    return jl.init(key, world.fn, world.params, world.batches[0], methods=methods)


def test_every_layer_is_diagonal_in_one_basis(world):
    adapter = jl.inits.frod(fresh(world, {"layers|head": FRoD()}), world.params)
    p = {k: np.asarray(t, np.float64) for k, t in adapter.frozen["layers"].items()}
    np.testing.assert_array_equal(p["v"][0], p["v"][1])
    for k, w in enumerate(world.weights["layers"]):
        np.testing.assert_allclose(p["v"][k] @ np.diag(p["lam0"][k]) @ p["u"][k], w, atol=1e-5)
    np.testing.assert_array_equal(
        adapter.trainable["layers"]["lam"], adapter.frozen["layers"]["lam0"]
    )
    world.unchanged(adapter)


def test_fewer_outputs_than_inputs_make_an_orthonormal_basis():
    w = np.random.default_rng(0).normal(size=(2, 9, 3))
    v = joint_basis(list(w))
    np.testing.assert_allclose(v.T @ v, np.eye(9), atol=1e-12)


def test_layers_that_are_not_stacked_share_one_too():
    rng = np.random.default_rng(0)
    params = {f"layer_{k}": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for k in range(2)}

    def fn(p, x):
        return x @ p["layer_0"] @ p["layer_1"]

    made = jl.init(jax.random.key(0), fn, params, jnp.ones((1, 4)), methods={"layer": FRoD()})
    shared = jl.inits.frod(made, params).frozen
    np.testing.assert_array_equal(shared["layer_0"]["v"], shared["layer_1"]["v"])
    alone = jl.inits.frod(made, params, role=lambda site: site.path)
    np.testing.assert_array_equal(alone.frozen["layer_0"]["v"], made.frozen["layer_0"]["v"])


def test_refusals(world):
    with pytest.raises(ValueError, match=r"head: got the method LoRA.*expected FRoD"):
        jl.inits.frod(fresh(world, {"head": jl.LoRA(rank=2)}), world.params)
    adapter = fresh(world, {"layers|head": FRoD()})
    bad = {**world.params, "layers": world.params["layers"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="layers: got a weight with values that are not finite"):
        jl.inits.frod(adapter, bad)
    zero = {**world.params, "layers": jnp.zeros((2, 8, 8)).at[:, 0, 0].set(1)}
    merged = jl.merge(zero, jl.inits.frod(adapter, zero))
    np.testing.assert_array_equal(merged["layers"], zero["layers"])

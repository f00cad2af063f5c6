"""What initialisations are made of: sites of a call, factors from elsewhere, abstract weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.inits.start import filled, fresh, from_matrices, with_core
from jlora.methods.low_rank.lora_xs import LoRAXS

SHAPES = {"layers": (2, 8, 8), "head": (6, 8)}


def abstract(world, change=jl.Residual):
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
    return fresh(world.fn, params, world.batches, world.methods, change)[0]


def test_a_generator_of_batches_is_not_used_up(world):
    batches = iter(world.batches)
    _, rest = fresh(world.fn, world.params, batches, world.methods, jl.Residual)
    for got, want in zip(rest, world.batches, strict=True):
        assert got is want


def test_factors_from_elsewhere_on_abstract_weights(world):
    """One site at a time, in the order of sites; the function stays what it is."""
    rng, calls = np.random.default_rng(2), []

    def factors(site):
        calls.append(site.path)
        a, b = ((*site.stack, site.d_in, 2), (*site.stack, 2, site.d_out))
        return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (a, b))

    adapter = jl.inits.from_factors(abstract(world), factors)
    assert calls == ["head", "layers"]
    world.unchanged(adapter)
    p = world.arrays(adapter, "head")
    assert np.abs(p["a"] @ p["b"]).max() > 0.1 and np.array_equal(p["a"], p["a0"])
    again = {s.path: tuple(adapter.trainable[s.path][k] for k in "ab") for s, _ in adapter.sites}
    plain = jl.inits.from_factors(abstract(world, lambda m: m), again)
    want = world.weights["head"] + 3 * p["a"] @ p["b"]
    np.testing.assert_allclose(np.asarray(jl.merge(world.params, plain)["head"]).T, want, atol=1e-4)


def test_refusals(world):
    adapter = abstract(world)
    with pytest.raises(ValueError, match="head: got no factors, expected those of"):
        jl.inits.from_factors(adapter, {"body": None})
    wrong = {path: (jnp.ones((3, 2)), jnp.ones((2, 3))) for path in SHAPES}
    with pytest.raises(ValueError, match=r"head/a: got shape \(3, 2\), expected \(8, 2\)"):
        jl.inits.from_factors(adapter, wrong)
    missing = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
    with pytest.raises(ValueError, match="head: got an abstract weight, expected one with values"):
        filled(adapter, missing, lambda *a, rank: {}, name="x")
    with pytest.raises(ValueError, match="x: got a bank of 2 adapters"):
        filled(jl.stack([adapter, adapter]), world.params, lambda *a, rank: {}, name="x")
    with pytest.raises(ValueError, match="batches: got int, expected an iterable"):
        fresh(world.fn, world.params, 3, world.methods, jl.Residual)


def test_a_square_matrix_between_frozen_factors(world):
    plain = abstract(world, lambda m: m)
    adapter = with_core(plain)
    assert {m for _, m in adapter.sites} == {LoRAXS(rank=2)}
    world.unchanged(adapter)
    parts = {"head": [{"core": jnp.eye(2)}], "layers": [{"core": jnp.eye(2) * k} for k in (1, 2)]}
    p = world.arrays(from_matrices(adapter, parts), "layers")
    np.testing.assert_array_equal(p["core"], np.stack([np.eye(2), 2 * np.eye(2)]))

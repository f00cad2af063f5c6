"""LoftQ: nearer than quantising alone, exact at full rank, PEFT's factors of the residual."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.loftq")


def started(world, **more):
    more = {"methods": world.methods, "block": 8, **more}
    return jl.inits.loftq(world.fn, world.params, world.batches, **more)


def errors(world, params, adapter):
    """{path: distance of the merged weight to the weight}, and that of the quantised base."""
    merged = jl.merge(params, adapter)
    return {
        path: (
            np.linalg.norm(np.asarray(merged[path]) - np.asarray(w)),
            np.linalg.norm(np.asarray(jl.quantize(w, 4, 8).dequantize()) - np.asarray(w)),
        )
        for path, w in world.params.items()
    }


def check_value(world):
    """The error is the tail of the residual's spectrum; more turns bring it further down."""
    params, adapter = started(world)
    assert all(isinstance(w, jl.Quantized) for w in params.values())
    for path, (got, plain) in errors(world, params, adapter).items():
        left = np.asarray(world.params[path], "f8") - np.asarray(params[path].dequantize(), "f8")
        tail = np.linalg.svd(left, compute_uv=False)[..., 2:]
        np.testing.assert_allclose(got, np.sqrt((tail**2).sum()), rtol=1e-3)
        assert got < 0.95 * plain
    turns = errors(world, *started(world, iterations=5))
    assert sum(e for e, _ in turns.values()) < sum(
        e for e, _ in errors(world, params, adapter).values()
    )


def test_value(world):
    check_value(world)


def test_mutation_a_forgotten_scale_is_seen(world, monkeypatch):
    good = module.leading_factors
    monkeypatch.setattr(module, "leading_factors", lambda u, s, vt, scale: good(u, s, vt, 1.0))
    with pytest.raises(AssertionError):
        check_value(world)


def test_limit_full_rank_is_exact(world):
    params, adapter = started(world, methods={"head": jl.LoRA(rank=6)})
    assert errors(world, params, adapter)["head"][0] < 1e-4
    assert params["layers"] is world.params["layers"]


def test_the_factors_of_peft(world):
    """Its decomposition of what is left; its quantisation needs a GPU."""
    pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from peft.utils.loftq_utils import _low_rank_decomposition

    params, adapter = started(world)
    left = np.asarray(world.params["head"]) - np.asarray(params["head"].dequantize())
    found = _low_rank_decomposition(torch.tensor(left), reduced_rank=2)
    p = world.arrays(adapter, "head")
    np.testing.assert_allclose(3 * (p["a"] @ p["b"]).T, found["L"] @ found["R"], atol=1e-4)


def test_refusals(world):
    with pytest.raises(ValueError, match="iterations: got 0, expected at least 1"):
        started(world, iterations=0)
    with pytest.raises(ValueError, match="bits: got 3, expected 8 or 4"):
        started(world, bits=3)
    with pytest.raises(ValueError, match="block: got 16, expected an even divisor of 8"):
        started(world, block=16)
    bad = {**world.params, "head": world.params["head"] * jnp.float32("inf")}
    with pytest.raises(ValueError, match="head: got a weight with values that are not finite"):
        jl.inits.loftq(world.fn, bad, world.batches, methods=world.methods)

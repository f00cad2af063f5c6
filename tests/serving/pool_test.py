"""The pool: a mixed batch by numpy while adapters come and go, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.serving import pool as module
from jlora.serving.pool import load, run, start, unload

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}
XS = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)


def model(p, x):
    y = x @ p["w"]
    return {"y": y, "best": jnp.argmax(y).astype(jnp.int32)}


def adapter(rank, seed=0, alpha=8.0, method=jl.LoRA):
    a = jl.init(
        jax.random.key(seed), model, PARAMS, XS[0], methods={"w": method(rank, alpha=alpha)}
    )
    b = np.random.default_rng(seed).normal(size=(rank, 3))
    return a.replace(trainable={"w": {**a.trainable["w"], "b": jnp.asarray(b, jnp.float32)}})


def empty():
    a = adapter(2)
    return a.replace(trainable={"w": {**a.trainable["w"], "b": jnp.zeros((2, 3))}})


SMALL, LARGE = adapter(1, 1, alpha=3.0), adapter(2, 2)


def by_numpy(a, x):
    w = np.float64(PARAMS["w"])
    if a is not None:
        t, scale = a.trainable["w"], float(a.frozen["w"]["scale"])
        w = w + scale * np.float64(t["a"]) @ np.float64(t["b"])
    return np.float64(x) @ w


def check_value():
    pool = load(start(model, PARAMS, empty(), 2), "large", LARGE)
    pool = load(unload(pool, "large"), "small", SMALL)
    pool = load(pool, "again", LARGE)
    assert pool.free == 0 and unload(pool, "small").free == 1
    found = run(pool, ["again", None, "small"], XS)
    want = [by_numpy(a, x) for a, x in zip((LARGE, None, SMALL), XS, strict=True)]
    np.testing.assert_allclose(found.outputs["y"], want, atol=1e-5)
    np.testing.assert_array_equal(found.outputs["best"], np.argmax(want, axis=1))
    assert not found.errors


def test_a_mixed_batch_by_numpy_after_a_slot_was_used_twice():
    check_value()


def test_an_unknown_adapter_is_the_error_of_its_rows():
    found = run(start(model, PARAMS, empty(), 1), [None, "x", "y"], XS)
    assert sorted(found.errors) == [1, 2]
    assert "x: not loaded; there are []" in str(found.errors[1])
    assert np.isnan(found.outputs["y"][1:]).all() and np.isfinite(found.outputs["y"][0]).all()
    with pytest.raises(ValueError, match="names: got 2, expected one per row"):
        run(start(model, PARAMS, empty(), 1), [None, None], XS)


def test_mutation_slots_that_are_off_by_one(monkeypatch):
    right = module._write
    monkeypatch.setattr(module, "_write", lambda served, one, slot: right(served, one, slot - 1))
    with pytest.raises(AssertionError):
        check_value()


def test_refusals():
    pool = start(model, PARAMS, empty(), 1)
    with pytest.raises(ValueError, match=r"big: w: got LoRA\(rank=3.*expected at most LoRA\(rank"):
        load(pool, "big", adapter(3))
    with pytest.raises(ValueError, match="other: adapter 1: got w DoRA"):
        load(pool, "other", adapter(2, method=jl.DoRA))
    bad = SMALL.replace(frozen={"w": {"scale": jnp.asarray(jnp.nan)}})
    with pytest.raises(ValueError, match="bad: got an array that is not finite"):
        load(pool, "bad", bad)
    with pytest.raises(ValueError, match="many: got a bank of 2 adapters"):
        load(pool, "many", jl.stack([SMALL, SMALL]))
    with pytest.raises(ValueError, match="capacity: got 0, expected at least 1"):
        start(model, PARAMS, empty(), 0)
    with pytest.raises(KeyError, match=r"nobody: not loaded; there are \[\]"):
        unload(pool, "nobody")

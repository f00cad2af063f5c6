"""The paged pool: mixed batches by numpy while adapters of other ranks come and go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.serving import paged_pool as module
from jlora.serving.paged_pool import in_pages, in_use, load, run, start, unload
from jlora.serving.pages import count_free, empty_table, put

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(40, 30)), jnp.float32)}
XS = jnp.asarray(RNG.normal(size=(3, 40)), jnp.float32)


def model(p, x):
    y = x @ p["w"]
    return {"y": y, "best": jnp.argmax(y).astype(jnp.int32)}


def adapter(rank, seed=0, method=jl.LoRA):
    a = jl.init(jax.random.key(seed), model, PARAMS, XS[0], methods={"w": method(rank, alpha=3.0)})
    b = np.random.default_rng(seed).normal(size=(rank, 30))
    return a.replace(trainable={"w": {**a.trainable["w"], "b": jnp.asarray(b, jnp.float32)}})


EMPTY, SMALL, LARGE = adapter(4), adapter(1, 1), adapter(4, 2)


def by_numpy(a, x):
    w = np.float64(PARAMS["w"])
    if a is not None:
        t, scale = a.trainable["w"], float(a.frozen["w"]["scale"])
        w = w + scale * np.float64(t["a"]) @ np.float64(t["b"])
    return np.float64(x) @ w


def check_value():
    pool = load(start(model, PARAMS, EMPTY, 2), "large", LARGE)
    pool = load(unload(pool, "large"), "small", SMALL)
    pool = load(pool, "again", LARGE)
    found = run(pool, ["again", None, "small"], XS)
    want = [by_numpy(a, x) for a, x in zip((LARGE, None, SMALL), XS, strict=True)]
    np.testing.assert_allclose(found.outputs["y"], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.outputs["best"], np.argmax(want, axis=1))
    assert not found.errors
    return pool


def test_a_mixed_batch_by_numpy_after_pages_were_used_twice():
    pool = check_value()
    assert count_free(pool.table) == 2 * 4 * 2 - (1 + 4) * 2  # 70 numbers in pages of 64


def test_mutation_pages_that_are_off_by_one(monkeypatch):
    right = module._write
    monkeypatch.setattr(module, "_write", lambda data, at, rows: right(data, at - 1, rows))
    with pytest.raises(AssertionError):
        check_value()


def test_components_lie_where_the_table_says():
    flat = np.arange(12.0).reshape(2, 6)
    rows = in_pages(flat, 4)
    assert rows.shape == (4, 4) and rows[1].tolist() == [4, 5, 0, 0]
    table, _ = put(empty_table(9), "a", 4)
    table, _ = put(table, "b", 2)
    where, owner = in_use(table, ["b", "a"], 2, least=2)
    assert owner.tolist() == [0, 1, 1, -1]
    assert where.tolist() == [[5, 6], [1, 2], [3, 4], [0, 0]]


def test_refusals():
    pool = start(model, PARAMS, EMPTY, 1)
    with pytest.raises(ValueError, match=r"big: w: got LoRA\(rank=5.*expected rank 4 at most"):
        load(pool, "big", adapter(5))
    with pytest.raises(ValueError, match="other: w: got DoRA, expected a method"):
        load(pool, "other", adapter(2, method=jl.DoRA))
    bad = SMALL.replace(frozen={"w": {"scale": jnp.asarray(jnp.nan)}})
    with pytest.raises(ValueError, match="bad: w: got numbers that are not finite"):
        load(pool, "bad", bad)
    with pytest.raises(ValueError, match="capacity: got 0, expected at least 1"):
        start(model, PARAMS, EMPTY, 0)
    with pytest.raises(ValueError, match="names: got 1, expected one per row"):
        run(pool, [None], XS)
    full = load(pool, "one", SMALL)
    with pytest.raises(ValueError, match="two: got a full pool of 1 adapters"):
        load(dataclasses.replace(full), "two", SMALL)

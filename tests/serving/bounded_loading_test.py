"""Loading on the way: every arrival by numpy, waiting by gated threads, the profile, the patch."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.serving.bounded_loading import cosines, patch, profiled, request, unpatch

STEPS = 5
Z = np.asarray([1.0, -2.0, 0.5], np.float32)


def leaf(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


def params():
    return {"w": leaf(0, 3, 3), "b": leaf(1, 3)}


def adapter(seed=2):
    shapes = jax.eval_shape(lambda: params())
    one = jl.init(jax.random.key(0), lambda p, x: x @ p["w"] + p["b"], shapes, jnp.ones(3),
                  methods={"w": jl.LoRA(2, 2.0)})  # fmt: skip
    return one.replace(trainable={"w": {"a": leaf(seed, 3, 2), "b": leaf(seed + 1, 2, 3)}})


@jax.jit
def step(p, z, k):
    return z + 0.1 * (z @ p["w"] + (k + 1.0) * p["b"])


def by_numpy(patched):
    p = {k: np.asarray(v, np.float64) for k, v in params().items()}
    pair = adapter().trainable["w"]
    moved = p["w"] + np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"])
    z = Z.astype(np.float64)
    for k in range(STEPS):
        z = z + 0.1 * (z @ (moved if k >= patched else p["w"]) + (k + 1.0) * p["b"])
    return z


@pytest.fixture(scope="module")
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def arrives(after, bound, executor, merged=patch):
    """A request whose adapter arrives when that many steps have been made."""
    gate, made, loaded = threading.Event(), [0], threading.Event()

    def load():
        assert gate.wait(60)
        loaded.set()
        return adapter()

    def counted(p, z, k):
        z = step(p, z, jnp.float32(k))
        made[0] += 1
        if made[0] == after:
            gate.set()
            assert loaded.wait(60)
            last.result()  # the thread is idle again: the load is done
        return z

    class Pool:
        def submit(self, call):
            nonlocal last
            first = executor.submit(call)
            last = executor.submit(lambda: None)
            return first

    last = None
    if after == 0:
        gate.set()
    if bound < after:  # only a wait can end: it opens the gate a little later
        threading.Timer(0.2, gate.set).start()
    return request(counted, params(), jnp.asarray(Z), STEPS, load, bound, Pool(), merged)


@pytest.mark.parametrize("after, bound, patched", [(2, 4, 2), (3, 1, 1), (4, 0, 0), (1, 1, 1)])
def test_the_adapter_is_in_from_its_arrival_or_the_bound_on(after, bound, patched, executor):
    got = arrives(after, bound, executor)
    assert got.patched == patched
    np.testing.assert_allclose(got.z, by_numpy(patched), rtol=1e-5)
    assert (got.waited > 0.05) == (bound < after)
    expected = jl.merge(params(), adapter())["w"]
    np.testing.assert_allclose(got.params["w"], expected, atol=1e-6)


def test_a_late_adapter_without_a_bound_leaves_the_base(executor):
    got = arrives(STEPS, STEPS, executor)
    assert got.patched == STEPS
    np.testing.assert_allclose(got.z, by_numpy(STEPS), rtol=1e-5)
    np.testing.assert_array_equal(got.params["w"], params()["w"])


def test_mutation_a_patch_that_does_nothing(executor):
    with pytest.raises(AssertionError):
        got = arrives(2, 4, executor, merged=lambda p, a: p)
        np.testing.assert_allclose(got.z, by_numpy(2), rtol=1e-5)


def test_neither_steps_nor_patches_are_compiled_again(executor):
    arrives(2, 4, executor)
    before = step._cache_size(), patch._cache_size()
    arrives(1, 4, executor)
    patch(params(), adapter(7))
    assert (step._cache_size(), patch._cache_size()) == before


def test_the_patch_takes_the_memory_of_the_weights_and_can_be_undone():
    given = params()
    merged = patch(given, adapter())
    assert given["w"].is_deleted()
    np.testing.assert_allclose(merged["w"], jl.merge(params(), adapter())["w"], atol=1e-6)
    back = unpatch(merged, adapter())
    np.testing.assert_allclose(back["w"], params()["w"], atol=1e-6)
    np.testing.assert_array_equal(back["b"], params()["b"])


def test_what_loading_raises_is_raised(executor):
    def load():
        raise OSError("no such adapter")

    with pytest.raises(OSError, match="no such adapter"):
        request(step, params(), jnp.asarray(Z), STEPS, load, 1, executor)
    with pytest.raises(ValueError, match="bound: got 6, expected 0 to 5"):
        request(step, params(), jnp.asarray(Z), STEPS, load, 6, executor)


def states(angles):
    """Two samples whose states turn away by known angles."""
    one = np.tile(np.asarray([1.0, 0.0]), (2, len(angles), 1))
    other = np.stack([np.cos(angles), np.sin(angles)], -1)
    return one, np.stack([3.0 * other, other])


def test_the_profile_of_known_angles():
    one, other = states(np.asarray([0.0, 0.05, 0.1, 0.2, 0.1]))
    alike = cosines(one, other)
    np.testing.assert_allclose(alike, np.cos([0.0, 0.05, 0.1, 0.2, 0.1]))
    assert profiled(alike) == 2  # cos 0.2 = 0.980; a later return does not count
    assert profiled(alike, 0.9) == 4 and profiled(alike, 0.9999) == 0
    with pytest.raises(ValueError, match="expected one noise"):
        profiled(np.asarray([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"expected \[n, states, ...\]"):
        cosines(one, other[:1])


def test_mutation_the_profile_one_step_later(monkeypatch):
    right = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda x: right(x) + 1)
    with pytest.raises(AssertionError):
        test_the_profile_of_known_angles()

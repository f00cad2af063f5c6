"""Experts in a loop: the same function as MeteoRA's, timed in every order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import meteora_time as file
from jlora.methods import MeteoRA


def arrays(scale=1.0):
    draw = np.random.default_rng(0)
    shapes = {"gate": (6, 4), "a": (4, 6, 3), "b": (4, 3, 5), "scales": (4,)}
    found = {k: jnp.asarray(draw.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return found | {"scales": scale * found["scales"]}


def test_a_loop_is_the_same_function_by_numpy():
    p, x, w = arrays(), np.random.default_rng(1).normal(size=(7, 6)), np.ones((6, 5))
    x, w = (jnp.asarray(t, jnp.float32) for t in (x, w))
    looped = file.Looped(4, 2, 3).apply(x, w, p, {})[0]
    n = {k: np.asarray(t, "f8") for k, t in p.items()}
    want = np.asarray(x @ w, "f8")
    for t, row in enumerate(np.asarray(x, "f8")):
        logits = row @ n["gate"]
        best = np.argsort(-logits)[:2]
        weight = np.exp(logits[best]) / np.exp(logits[best]).sum()
        want[t] += sum(g * n["scales"][e] * row @ n["a"][e] @ n["b"][e]
                       for e, g in zip(best, weight, strict=True))  # fmt: skip
    np.testing.assert_allclose(looped, want, atol=1e-4)
    for backend in ("gather", "dense"):
        ours = MeteoRA(4, 2, 3, backend=backend).apply(x, w, p, {})[0]
        np.testing.assert_allclose(ours, looped, atol=1e-4)


def test_programs_that_differ_are_refused():
    calls = {"a": lambda: np.zeros(3), "b": lambda: np.full(3, 0.1)}
    file.same({"a": calls["a"], "b": calls["a"]}, "a", "b")
    with pytest.raises(ValueError, match=r"a and b: got logits 0\.1 apart, expected at most"):
        file.same(calls, "a", "b")


def test_every_round_times_all_in_an_order_of_its_own():
    seen = []

    def call(name):
        seen.append(name)
        return jnp.zeros(())

    found = file.timed({n: lambda n=n: call(n) for n in "abc"}, 6, 2, 0)
    assert {n: x.shape for n, x in found.items()} == dict.fromkeys("abc", (6,))
    assert all((x > 0).all() for x in found.values())
    rounds = np.asarray(seen[3:]).reshape(6, 3, 2)  # after a call of each to warm up
    assert (rounds[..., 0] == rounds[..., 1]).all()
    assert all(set(r[:, 0]) == set("abc") for r in rounds)
    assert len({tuple(r[:, 0]) for r in rounds}) > 1


def test_all_methods_of_a_seed_have_the_same_values(domains):
    methods = file.MeteoRA(3, 2, 2), file.Looped(3, 2, 2)
    one, other = (file.adapter_of(domains.config, domains.params, m, 5) for m in methods)
    jax.tree.map(np.testing.assert_array_equal, one.frozen, other.frozen)
    jax.tree.map(np.testing.assert_array_equal, one.trainable, other.trainable)
    assert all(np.abs(np.asarray(d["b"])).max() > 0 for d in one.frozen.values())

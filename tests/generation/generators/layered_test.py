"""The layered discriminant against float64 NumPy: weights, memory, exchange of classes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator
from jlora.generation.generators import class_memory, layer_reading, layered
from jlora.generation.generators.layered import LayeredConfig

KEY = jax.random.key(0)
CONFIG = LayeredConfig(site="layers", ridge=0.7, trust=5.0)
L, M, C, K = 2, 6, 3, 4
LABELS = np.repeat(np.arange(C), K)


@functools.cache
def task():
    """(features of training texts [N, L, m], their class, those of the examples)."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 40)
    centres = 2 * rng.normal(size=(5, L, M))
    rows = 1.0 + centres[groups] + rng.normal(size=(200, L, M))
    own = 1.0 + centres[1] + rng.normal(size=(K, L, M))  # a class of the memory
    new = 1.0 + 4 * rng.normal(size=(2, 1, L, M)) + rng.normal(size=(2, K, L, M))
    return rows, groups, np.concatenate([own, *new]).astype("f4")


@functools.cache
def state():
    """A generator that remembers five classes."""
    rows, groups, _ = task()
    at = generator.world(jl.LoRA(C, alpha=6.0), width=C * K * L * M)
    heads = np.linalg.qr(np.random.default_rng(1).normal(size=(M, C)))[0].T.astype("f4")
    read = layer_reading.reading(rows, rows[:, 1], np.broadcast_to(np.eye(M), (L, M, M)))
    seen = layer_reading.seen(read, jnp.asarray(rows, "f4"), CONFIG.share)
    known = class_memory.memory(*(np.asarray(t) for t in seen), groups)
    given = KEY, at.conditions, at.groups, at.bank, jnp.asarray(heads), CONFIG
    return layered.fit(*given, read, known)


def solve(of, x=None, labels=LABELS, used=None, heads=None):
    """a b [L, m, d] of examples."""
    x = task()[2] if x is None else x
    used = np.ones(len(x), "f4") if used is None else used
    heads = of.heads if heads is None else jnp.asarray(heads)
    a, b = SOLVE(of, jnp.asarray(x), jnp.asarray(labels), jnp.asarray(used), heads)
    return np.asarray(a, "f8") @ np.asarray(b, "f8")


SOLVE = jax.jit(layered.solution)


def scores(of, remembered):
    """W, x-bar and s / nu in float64, straight from the primal equations."""
    embedding, x = (
        np.asarray(t, "f8")
        for t in layer_reading.seen(of.reading, jnp.asarray(task()[2]), CONFIG.share)
    )
    y, weight = np.eye(C)[LABELS], np.ones(C * K)
    if remembered:
        means = np.stack([embedding[LABELS == c].mean(0) for c in range(C)])
        sure, rows = class_memory.recognised(
            of.known, jnp.asarray(means, "f4"), jnp.full(C, float(K)), CONFIG.caution
        )
        assert sure[0] > 0.5 > 0.1 > sure[1:].max(), "one class is remembered"
        x, y = np.concatenate([x, rows]), np.concatenate([y, np.eye(C)])
        weight = np.concatenate([weight, CONFIG.trust * np.asarray(sure, "f8")])
    total = weight @ y
    weight = weight * (total.min() / total)[y.argmax(1)]
    centre = np.mean([(weight * y[:, c]) @ x / (weight @ y[:, c]) for c in range(C)], 0)
    z = x - centre
    tau = np.sum(weight[:, None] * z**2) / weight.sum()
    left = z.T @ (weight[:, None] * z) + CONFIG.ridge * tau * np.eye(z.shape[1])
    w = np.linalg.solve(left, z.T @ (weight[:, None] * (y - 1 / C)))
    spread = np.sum((z[: C * K] @ w) ** 2) / (C * K) / (C - 1)
    return w, centre, CONFIG.gain / np.sqrt(spread)


@pytest.mark.parametrize("remembered", [False, True])
def test_the_adapter_has_the_scores_of_the_weighted_ridge_regression(remembered):
    of = state() if remembered else dataclasses.replace(state(), known=None)
    w, centre, gain = scores(of, remembered)
    given = [jnp.asarray(t, "f4") for t in (gain * w, centre)]
    a, b = layer_reading.factors(of.reading, CONFIG.share, *given, of.heads)
    want = np.asarray(a, "f8") @ np.asarray(b, "f8")
    got = solve(of)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4 * np.abs(want).max())
    # Mutation: an adapter that forgets, or that remembers, is another one.
    other = solve(dataclasses.replace(of, known=None if remembered else state().known))
    assert np.abs(got - other).max() > 2e-3 * np.abs(got).max(), "ten tolerances"


def test_the_generated_adapter_holds_the_factors_and_nothing_else():
    of = state()
    adapter = jax.jit(layered.generate)(KEY, of, jnp.asarray(task()[2]).reshape(-1))
    for site, _ in adapter.sites:
        leaves, _ = adapter.arrays(site)
        delta = np.asarray(leaves["a"], "f8") @ np.asarray(leaves["b"], "f8")
        if site.path == "layers":
            scaled = delta * np.asarray(leaves["scale"], "f8")[:, None, None]
            np.testing.assert_allclose(scaled, solve(of), rtol=1e-4, atol=1e-6)
        else:
            assert not delta.any()


def test_classes_are_exchangeable_and_unused_rows_do_not_count():
    of, order = state(), np.asarray([2, 0, 1])
    want = solve(of)
    moved = solve(of, labels=np.argsort(order)[LABELS], heads=np.asarray(of.heads)[order])
    np.testing.assert_allclose(moved, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    assert np.abs(solve(of, labels=np.roll(LABELS, K)) - want).max() > 0.1 * np.abs(want).max()
    x = np.array(task()[2])
    x[1] = 50.0
    used = np.ones(C * K, "f4")
    used[1] = 0
    with_noise = solve(of, x, used=used)
    x[1] = task()[2][1]
    np.testing.assert_allclose(with_noise, solve(of, x, used=used), rtol=1e-4, atol=1e-5)
    assert np.abs(with_noise - want).max() > 1e-3 * np.abs(want).max()


def test_equal_examples_say_nothing():
    same = np.broadcast_to(task()[2][:1], task()[2].shape)
    forgetful = dataclasses.replace(state(), known=None)
    assert not solve(forgetful, same).any() and solve(forgetful).any()


def test_what_does_not_fit_is_refused():
    at = generator.world(jl.LoRA(C), width=C * K * L * M)
    given = KEY, at.conditions, at.groups, at.bank
    heads = jnp.eye(C, M)
    with pytest.raises(ValueError, match=r"heads: got shape \(3, 5\), expected \(C, 6\)"):
        layered.fit(*given, jnp.eye(C, 5), CONFIG)
    with pytest.raises(ValueError, match=r"last: got leaves .*, expected stacks"):
        layered.fit(*given, heads, dataclasses.replace(CONFIG, site="last"))
    with pytest.raises(ValueError, match="got width 140, expected C K L m = 3 K 2 6"):
        layered.fit(KEY, at.conditions[:, :140], *given[2:], heads, CONFIG)
    with pytest.raises(ValueError, match="expected finite numbers"):
        layered.generate(KEY, state(), jnp.full(C * K * L * M, jnp.nan))

"""AltLoRA and AltLoRA+: steps by numpy, the order of the factors, the projected gradient."""

import importlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.optimizers import alt_lora
from tests.optimizers.conftest import SCALE

lib = importlib.import_module("jlora.optimizers.alt_lora")
RATE, B1, B2, EPS, DAMPING = 0.1, 0.7, 0.9, 1e-3, 0.2


def by_numpy(site, steps, every, adaptive):
    """Where the factors are after some steps; one factor's momentum at a time."""
    at = {"b": site.b.T, "a": site.a}  # as columns, so that one formula serves both
    kept = {n: {"t": 0, "m": 0 * at[n], "v": 0 * at[n]} for n in "ab"}
    for step in range(steps):
        own, other = ("b", "a") if (step // every) % 2 == 0 else ("a", "b")
        g = {"a": SCALE * site.g @ at["b"], "b": SCALE * site.g.T @ at["a"]}[own]
        basis, k = at[other], kept[own]
        inverse = np.linalg.inv(basis.T @ basis + DAMPING * np.eye(2))
        new = g @ inverse / SCALE**2
        turn = k.get("basis", basis).T @ basis @ inverse
        k["t"], k["m"], k["basis"] = k["t"] + 1, B1 * k["m"] @ turn + (1 - B1) * new, basis
        u = k["m"] / (1 - B1 ** k["t"])
        if adaptive:
            k["v"] = B2 * k["v"] + (1 - B2) * new**2
            u = u / (np.sqrt(k["v"] / (1 - B2 ** k["t"])) + EPS)
        at = {**at, own: at[own] - RATE * u}
    return at["a"], at["b"].T


def check_value(site, every=1, adaptive=False):
    rule = alt_lora(B1, B2, EPS, DAMPING, every, adaptive)
    _, (a, b) = site.run(optax.chain(rule, optax.scale_by_learning_rate(RATE)), 6)
    want_a, want_b = by_numpy(site, 6, every, adaptive)
    np.testing.assert_allclose(a, want_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b, want_b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("every", "adaptive"), [(1, False), (2, True)])
def test_value(site, every, adaptive):
    check_value(site, every, adaptive)


def test_b_is_first_then_a_and_each_moves_the_delta_by_the_projected_gradient(site):
    rule = alt_lora(b1=0.0, damping=1e-8)
    (first, second), _ = site.run(rule, 2)
    np.testing.assert_array_equal(first[0], 0)
    np.testing.assert_array_equal(second[1], 0)
    onto_a = site.a @ np.linalg.pinv(site.a)
    np.testing.assert_allclose(SCALE * site.a @ first[1], onto_a @ site.g, rtol=1e-4, atol=1e-5)
    b = site.b + first[1]
    onto_b = np.linalg.pinv(b) @ b
    np.testing.assert_allclose(SCALE * second[0] @ b, site.g @ onto_b, rtol=1e-4, atol=1e-5)


def test_limit_a_zero_b_is_no_trouble(site):
    found, _ = site.run(optax.chain(alt_lora(), optax.scale_by_learning_rate(RATE)), 4)
    start, _ = site.run(alt_lora(), 2, (site.a, 0 * site.b))
    assert np.isfinite(np.concatenate([u.ravel() for step in (*found, *start) for u in step])).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"b1, b2, eps: got 0\.9, 1\.0"):
        alt_lora(b2=1.0)
    with pytest.raises(ValueError, match="damping, every: got 1e-05, 0"):
        alt_lora(every=0)


def test_mutation_momentum_that_is_not_turned_is_seen(site, monkeypatch):
    monkeypatch.setattr(lib, "_turn", lambda last, basis, inverse: jnp.eye(2))
    with pytest.raises(AssertionError):
        check_value(site)

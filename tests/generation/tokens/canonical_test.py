"""Canonical factors: the delta is kept, the gauge is gone, and numpy agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.tokens import canonical

STACK, D_IN, D_OUT, R = 3, 9, 7, 3


def factors(seed, stack=(STACK,), rank=R):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(*stack, D_IN, rank)).astype("f4")
    b = rng.normal(size=(*stack, rank, D_OUT)).astype("f4")
    return {"q": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}


def regauge(tree, seed, orthogonal=False):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(STACK, R, R))
    if orthogonal:
        g = np.linalg.qr(g)[0]
    g = g.astype("f4")
    a, b = tree["q"]["a"] @ g, jnp.asarray(np.linalg.inv(g)) @ tree["q"]["b"]
    return {"q": {"a": a, "b": b}}


def close(x, y, tol=2e-4):
    return all(
        np.allclose(u, v, atol=tol)
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def delta(tree):
    return np.asarray(tree["q"]["a"], np.float64) @ np.asarray(tree["q"]["b"], np.float64)


CASES = [("balanced_svd", None), ("procrustes", factors(99))]


@pytest.mark.parametrize(("kind", "reference"), CASES)
def test_delta_kept_and_gauge_removed(kind, reference):
    run = jax.jit(lambda t: canonical.canonicalise(kind, t, reference=reference))
    x = factors(0)
    out = run(x)
    np.testing.assert_allclose(delta(out), delta(x), atol=1e-5)
    for seed in range(4):
        assert close(run(regauge(x, seed)), out)
        assert close(run(regauge(x, seed, orthogonal=True)), out, 1e-4)
    assert close(run(out), out)  # idempotent
    assert not close(run(factors(1)), out)


def test_balanced_svd_against_numpy_dense_svd():
    x = factors(0)
    out = canonical.canonicalise("balanced_svd", x)["q"]
    for i in range(STACK):
        u, s, vt = np.linalg.svd(delta(x)[i])
        u, s, vt = u[:, :R], s[:R], vt[:R]
        sign = np.sign(u[np.abs(u).argmax(0), np.arange(R)])
        np.testing.assert_allclose(out["a"][i], u * sign * np.sqrt(s), atol=1e-5)
        np.testing.assert_allclose(out["b"][i], (vt.T * sign * np.sqrt(s)).T, atol=1e-5)


def test_procrustes_against_numpy_and_its_claim():
    x, ref = factors(0), factors(99)
    out = canonical.canonicalise("procrustes", x, reference=ref)["q"]
    ref_balanced = canonical.canonicalise("balanced_svd", ref)["q"]
    balanced = canonical.canonicalise("balanced_svd", x)["q"]
    for i in range(STACK):
        m = np.concatenate([balanced["a"][i], balanced["b"][i].T])
        m0 = np.concatenate([ref_balanced["a"][i], ref_balanced["b"][i].T])
        p, _, qt = np.linalg.svd(m.T @ m0)
        got = np.concatenate([out["a"][i], out["b"][i].T])
        np.testing.assert_allclose(got, m @ p @ qt, atol=1e-4)
        best = np.linalg.norm(got - m0)
        for seed in range(20):  # no other rotation is closer
            g = np.linalg.qr(np.random.default_rng(seed).normal(size=(R, R)))[0]
            assert np.linalg.norm(m @ g - m0) > best - 1e-5
    # An adapter is its own best reference.
    assert close(canonical.canonicalise("procrustes", x, reference=x)["q"], balanced, 1e-4)


def test_without_the_sign_rule_the_gauge_shows(monkeypatch):
    x = factors(0)
    where = jnp.where
    monkeypatch.setattr(canonical.jnp, "where", lambda c, n, p: where(c, p, p))
    out = canonical.canonicalise("balanced_svd", x)
    np.testing.assert_allclose(delta(out), delta(x), atol=1e-5)
    turned = [canonical.canonicalise("balanced_svd", regauge(x, s)) for s in range(4)]
    assert not all(close(t, out) for t in turned)


@pytest.mark.parametrize("kind", ["none", "balanced_svd"])
def test_scale_is_folded_in_and_out(kind):
    """Equal deltas written with different alpha have equal canonical factors."""
    x = factors(0)
    s = {"q": jnp.asarray([2.0, -0.5, 3.0], jnp.float32)}
    out = canonical.canonicalise(kind, x, s)
    scaled = np.asarray(s["q"])[:, None, None] * delta(x)
    np.testing.assert_allclose(delta(out), scaled, atol=2e-5)
    other = {"q": x["q"] | {"b": x["q"]["b"] * s["q"][:, None, None]}}
    assert close(canonical.canonicalise(kind, other), out, 1e-5)
    back = canonical.unfold(out, s)
    np.testing.assert_allclose(delta(back), delta(x), atol=2e-5)


def test_limits():
    """No stack, a bank, a zero delta, a rank above the width, and further leaves."""
    zero = {"q": factors(0)["q"] | {"b": jnp.zeros((STACK, R, D_OUT)), "m": jnp.ones(STACK)}}
    out = canonical.canonicalise("balanced_svd", zero)["q"]
    assert not np.any(out["a"]) and not np.any(out["b"]) and np.all(out["m"] == 1)
    wide = factors(0, stack=(), rank=D_IN + 2)
    out = canonical.canonicalise("balanced_svd", wide)
    assert out["q"]["a"].shape == (D_IN, D_IN + 2)
    np.testing.assert_allclose(delta(out), delta(wide), atol=2e-5)
    bank = jax.tree.map(lambda *v: jnp.stack(v), factors(0), factors(1))
    got = jax.vmap(lambda t: canonical.canonicalise("balanced_svd", t))(bank)
    one = canonical.canonicalise("balanced_svd", factors(1))
    assert close(jax.tree.map(lambda v: v[1], got), one, 1e-5)


def test_never_forms_the_delta():
    text = str(jax.make_jaxpr(lambda t: canonical.canonicalise("balanced_svd", t))(factors(0)))
    assert f"{D_IN},{D_OUT}]" not in text and f"{D_OUT},{D_IN}]" not in text


def test_errors():
    x = factors(0)
    with pytest.raises(ValueError, match="unknown canonical form 'svd'"):
        canonical.canonicalise("svd", x)
    with pytest.raises(ValueError, match="requires a reference"):
        canonical.canonicalise("procrustes", x)
    with pytest.raises(ValueError, match=r"q: frozen_A wants trainable \{'b'\}, got"):
        canonical.canonicalise("frozen_A", x)
    only_b = {"q": {"b": x["q"]["b"]}}
    with pytest.raises(ValueError, match="q: balanced_svd wants"):
        canonical.canonicalise("balanced_svd", only_b)
    out = canonical.canonicalise("frozen_A", only_b)["q"]["b"]
    np.testing.assert_array_equal(out, only_b["q"]["b"])

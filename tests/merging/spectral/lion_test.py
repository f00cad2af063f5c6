"""LiON-LoRA fusion: norms, overlap, orthogonalisation, linear amplitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.spectral import lion as file
from jlora.merging.spectral.lion import lion, lion_orthogonal, overlap


def bank(n=3, d_in=6, r=2, d_out=5, seed=0):
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(n, d_in, r)), rng.normal(size=(n, r, d_out))
    u = u * np.asarray([1.0, 5.0, 0.3])[:n, None, None]
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


W = np.asarray([0.2, -0.5, 0.4], "f4")
X = np.random.default_rng(9).normal(size=(7, 6)).astype("f4")


@pytest.mark.parametrize("inputs", [None, X])
def test_value_by_numpy(inputs):
    d = dense(bank())
    seen = d if inputs is None else inputs @ d
    norms = np.linalg.norm(seen, axis=(1, 2))
    mean = np.abs(W) @ norms / np.abs(W).sum()
    expected = np.einsum("n,nio->io", W * mean / norms, d)
    got = lion(bank(), jnp.asarray(W), inputs=None if inputs is None else jnp.asarray(inputs))
    np.testing.assert_allclose(dense(got), expected, atol=1e-5)
    flat = seen.reshape(3, -1) / norms[:, None]
    np.testing.assert_allclose(overlap(bank(), inputs), flat @ flat.T, atol=1e-5)


@pytest.mark.parametrize("inputs", [None, X])
def test_parts_have_one_norm(inputs):
    """Norm consistency: what each adapter adds is as large as its weight says, not its norm."""
    parts = lion(bank(), jnp.ones(3), inputs=inputs)
    u, v = np.asarray(parts.u).reshape(6, 3, 2), np.asarray(parts.v).reshape(3, 2, 5)
    d = np.einsum("inr,nro->nio", u, v)
    norms = np.linalg.norm(d if inputs is None else inputs @ d, axis=(1, 2))
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


def test_orthogonal_fusion_by_numpy_and_linear_scale():
    """The part along direction n is w_n times the mean norm, whatever the other weights are."""
    d = dense(bank()).reshape(3, -1)
    norms = np.linalg.norm(d, axis=1)
    unit = d / norms[:, None]
    values, vectors = np.linalg.eigh(unit @ unit.T)
    frame = (vectors / np.sqrt(values)) @ vectors.T @ unit
    np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-10)
    for w in (W, np.asarray([0.2, 3.0, -1.0], "f4")):
        got = dense(lion_orthogonal(bank(), jnp.asarray(w))).reshape(-1)
        mean = np.abs(w) @ norms / np.abs(w).sum()
        np.testing.assert_allclose(frame @ got, w * mean, atol=1e-4)
    raw = dense(lion(bank(), jnp.asarray(W))).reshape(-1)
    assert np.abs(frame @ raw - W * (np.abs(W) @ norms / np.abs(W).sum())).max() > 0.05


def test_a_weak_adapter_is_heard():
    """The paper's claim in small: cosine of the fusion to its weakest part, against the raw sum."""
    d, even = dense(bank()), np.ones(3, "f4")
    raw, got = d.sum(0), dense(lion(bank(), jnp.asarray(even)))

    def share(x):
        return (x * d[2]).sum() / np.linalg.norm(x) / np.linalg.norm(d[2])

    assert share(raw) < 0.4 and share(got) > share(raw) + 0.2


def test_limits():
    one = LowRank(*(t[:1] for t in bank()))
    for orthogonal in (False, True):
        got = lion(one, jnp.ones(1), orthogonal=orthogonal)
        np.testing.assert_allclose(dense(got), dense(one)[0], atol=1e-5)
    same = LowRank(*(jnp.broadcast_to(t, (3, *t.shape[1:])) for t in one))
    np.testing.assert_allclose(dense(lion(same, jnp.ones(3) / 3)), dense(one)[0], atol=1e-5)
    muted = LowRank(bank().u.at[1].set(0.0), bank().v)
    norms = np.linalg.norm(dense(muted), axis=(1, 2))  # that of the muted one, 0, is in the mean
    share = W * (np.abs(W) @ norms / np.abs(W).sum()) / np.where(norms > 0, norms, 1)
    expected = np.einsum("n,nio->io", share, dense(muted))
    np.testing.assert_allclose(dense(lion(muted, jnp.asarray(W))), expected, atol=1e-5)
    for orthogonal in (False, True):
        got = lion(muted, jnp.asarray(W), orthogonal=orthogonal)
        assert np.isfinite(dense(got)).all() and np.abs(dense(got)).max() > 0
    assert np.all(dense(lion(bank(), jnp.zeros(3))) == 0)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_gradient_by_finite_differences(orthogonal):
    b, rng = bank(), np.random.default_rng(3)
    du, dw = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (b.u.shape, (3,)))

    @jax.jit
    def loss(t):
        out = lion(LowRank(b.u + t * du, b.v), jnp.asarray(W) + t * dw, orthogonal=orthogonal)
        return jnp.sum(jnp.sin(out.u @ out.v))

    h = 3e-3
    numeric = (loss(jnp.float32(h)) - loss(jnp.float32(-h))) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0)), numeric, rtol=3e-2)


def test_gradient_is_finite_with_a_zero_delta():
    b = LowRank(bank().u.at[1].set(0.0), bank().v)
    slope = jax.grad(lambda u: jnp.sum(jnp.sin(lion(LowRank(u, b.v), jnp.asarray(W)).u)))(b.u)
    assert np.isfinite(np.asarray(slope)).all()


def test_mutation_norms_that_are_not_divided_out(monkeypatch):
    monkeypatch.setattr(file, "_norms", lambda gram: (jnp.ones(3), jnp.ones(3)))
    for law in (test_value_by_numpy, test_parts_have_one_norm):
        with pytest.raises(AssertionError):
            law(None)


def test_refusal():
    with pytest.raises(ValueError, match=r"inputs: got shape \(7, 5\), expected \(T, 6\)"):
        lion(bank(), jnp.asarray(W), inputs=jnp.ones((7, 5)))

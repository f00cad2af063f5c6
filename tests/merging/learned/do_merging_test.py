"""DO-Merging: magnitudes, directions and descent against dense numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.learned import do_merging as file
from jlora.merging.learned.do_merging import decoupled, do_merging, overlap


def bank(n=3, d_in=6, r=2, d_out=5, seed=0):
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(n, d_in, r)), rng.normal(size=(n, r, d_out))
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


W = np.asarray([0.2, 0.5, 0.4], "f4")
STATIC = ("steps", "rate", "gamma")
RUN = jax.jit(file.do_merging, static_argnames=STATIC)
APART = jax.jit(file.orthogonalised, static_argnames=STATIC)


def by_numpy(deltas, w):
    m = np.linalg.norm(deltas, axis=2)
    direction = np.einsum("n,nio->io", w, deltas / m[..., None])
    return (np.abs(w) @ m / np.abs(w).sum())[:, None] * direction


@pytest.mark.parametrize("w", [W, W * np.asarray([1, -1, 1], "f4")])
def test_decoupling_by_numpy(w):
    got = RUN(bank(), jnp.asarray(w), steps=0)
    np.testing.assert_allclose(dense(got), by_numpy(dense(bank()), w), atol=1e-5)


def test_descent_by_numpy_on_dense_deltas():
    """The coefficients follow descent on the deltas themselves, one side, then the other."""
    b, rate, gamma, steps = bank(), 0.5, 0.1, 7
    x = dense(b)
    for side in (0, 1):
        x = x if side == 0 else x.swapaxes(1, 2)
        start, scale = x.copy(), 1.0 / (x**2).sum()
        for _ in range(steps):
            others = np.einsum("njo,npo->jp", x, x)[None] - x @ x.swapaxes(1, 2)
            x = x - rate * (scale * others @ x + gamma * (x - start))
        x = x if side == 0 else x.swapaxes(1, 2)
    got = APART(b, steps=steps, rate=rate, gamma=gamma)
    np.testing.assert_allclose(dense(got), x, atol=1e-5)
    merged = RUN(b, jnp.asarray(W), steps=steps, rate=rate, gamma=gamma)
    np.testing.assert_allclose(dense(merged), by_numpy(x, W), atol=1e-5)


def test_overlap_by_numpy_falls_while_deltas_hardly_move():
    b = bank(d_in=20, d_out=20, r=3)
    after = APART(b, steps=100)
    for side in (0, 1):
        x = dense(b) if side == 0 else dense(b).swapaxes(1, 2)
        expected = sum(
            np.linalg.norm(x[i].T @ x[j]) ** 2 for i in range(3) for j in range(i)
        ) / (x**2).sum() ** 2  # fmt: skip
        np.testing.assert_allclose(overlap(b)[side], expected, rtol=1e-4)
        assert float(overlap(after)[side]) < 0.35 * float(overlap(b)[side])
    assert np.linalg.norm(dense(after) - dense(b)) < 0.5 * np.linalg.norm(dense(b))


def test_one_large_adapter_does_not_take_the_direction():
    """The paper's claim in small: cosine to the small adapter, against the plain mean."""
    b = bank(2, d_in=24, d_out=20)
    loud = LowRank(b.u * jnp.asarray([1.0, 50.0])[:, None, None], b.v)
    small, even = dense(b)[0], jnp.full(2, 0.5)
    plain = cosine(dense(loud).mean(0), small)
    got = cosine(dense(RUN(loud, even, steps=0)), small)
    assert plain < 0.1 and got > 0.5
    pair = [dense(RUN(x, even, steps=0)) for x in (b, loud)]
    rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)  # the direction does not see scales


def test_limits():
    one = LowRank(*(t[:1] for t in bank()))
    np.testing.assert_allclose(dense(RUN(one, jnp.ones(1))), dense(one)[0], atol=1e-5)
    same = LowRank(*(jnp.broadcast_to(t, (3, *t.shape[1:])) for t in one))
    np.testing.assert_allclose(dense(decoupled(same, jnp.ones(3) / 3)), dense(one)[0], atol=1e-5)
    tripled = RUN(bank(), jnp.asarray(3 * W), steps=3)
    np.testing.assert_allclose(
        dense(tripled), 3 * dense(RUN(bank(), jnp.asarray(W), steps=3)), rtol=1e-4, atol=1e-5
    )


def test_zero_rows_and_zero_weights_are_no_nan():
    b = bank()
    b = LowRank(b.u.at[0, 2].set(0.0).at[1].set(0.0), b.v)
    got = RUN(b, jnp.zeros(3), steps=3)
    assert np.all(dense(got) == 0)

    @jax.jit
    def loss(u):
        return jnp.sum(jnp.sin(do_merging(LowRank(u, b.v), jnp.asarray(W), steps=3).u))

    assert np.isfinite(np.asarray(jax.grad(loss)(b.u))).all()


def test_gradient_by_finite_differences():
    b, rng = bank(), np.random.default_rng(3)
    du, dw = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (b.u.shape, (3,)))

    @jax.jit
    def loss(t):
        out = do_merging(LowRank(b.u + t * du, b.v), jnp.asarray(W) + t * dw, steps=5)
        return jnp.sum(jnp.sin(out.u @ out.v))

    h = 1e-2
    numeric = (loss(jnp.float32(h)) - loss(jnp.float32(-h))) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0)), numeric, rtol=2e-2)


def test_mutation_magnitudes_left_in(monkeypatch):
    monkeypatch.setattr(file, "decoupled", lambda b, w: file.concat(b, w))
    fresh = jax.jit(
        lambda *args, **options: file.do_merging(*args, **options), static_argnames=STATIC
    )
    monkeypatch.setitem(globals(), "RUN", fresh)
    with pytest.raises(AssertionError):
        test_decoupling_by_numpy(W)
    with pytest.raises(AssertionError):
        test_one_large_adapter_does_not_take_the_direction()


@pytest.mark.parametrize("bad", [{"steps": -1}, {"rate": 0.0}, {"gamma": -1.0}])
def test_refusals(bad):
    with pytest.raises(ValueError, match="steps, rate, gamma: got"):
        do_merging(bank(), jnp.asarray(W), **bad)

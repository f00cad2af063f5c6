"""LoRA-LEGO: clusters, dual reweighting and the two properties of units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.spectral import lego as file
from jlora.merging.spectral.lego import clusters, lego, lego_spectral, spectral


def bank(n=3, d_in=6, r=2, d_out=5, seed=0):
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(n, d_in, r)), rng.normal(size=(n, r, d_out))
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


W = np.asarray([0.2, 0.5, 0.4], "f4")
STATIC = ("rank", "steps", "units", "reweight", "norm")
RUN = jax.jit(file.lego, static_argnames=STATIC)


def by_numpy(b, w, k, steps=10):
    """The docstring in loops."""
    a, v = np.asarray(b.u, "f8"), np.asarray(b.v, "f8")
    n, _, r = a.shape
    pool = [(np.concatenate([a[i, :, j], v[i, j]]), w[i]) for i in range(n) for j in range(r)]
    split = a.shape[1]

    def unit(m):
        return np.concatenate([m[:split] / np.linalg.norm(m[:split]),
                               m[split:] / np.linalg.norm(m[split:])])  # fmt: skip

    x = np.stack([unit(m) for m, _ in pool])
    sizes = [np.linalg.norm(m[:split]) * np.linalg.norm(m[split:]) for m, _ in pool]
    chosen = [int(np.argmax(sizes))]
    while len(chosen) < k:
        far = ((x[:, None] - x[chosen][None]) ** 2).sum(2).min(1)
        far[chosen] = -1
        chosen.append(int(np.argmax(far + 1e-4 * np.square(sizes) / np.max(np.square(sizes)))))
    c, ties = x[chosen], 1e-4 * np.arange(k)[None] / k
    for _ in range(steps):
        own = (((x[:, None] - c[None]) ** 2).sum(2) + ties).argmin(1)
        c = np.stack([x[own == j].mean(0) if (own == j).any() else c[j] for j in range(k)])
    own = (((x[:, None] - c[None]) ** 2).sum(2) + ties).argmin(1)
    total = np.zeros((split, v.shape[2]))
    used = len(set(own.tolist()))
    for j in set(own.tolist()):
        members = [pool[i] for i in np.flatnonzero(own == j)]
        size = np.asarray([abs(q) for _, q in members])
        mu = sum(q * m for q, (m, _) in zip(size, members, strict=True)) / size.sum()
        length = size @ [np.linalg.norm(m) for m, _ in members] / size.sum()
        mu = mu * length / np.linalg.norm(mu)
        total += np.mean([n * q for _, q in members]) * np.outer(mu[:split], mu[split:])
    return np.sqrt(r / used) * total


@pytest.mark.parametrize("k", [1, 2, 4])
def test_value_by_numpy(k):
    got = RUN(bank(), jnp.asarray(W), rank=k)
    assert got.u.shape == (6, k)
    np.testing.assert_allclose(dense(got), by_numpy(bank(), W, k), atol=1e-5)


def test_as_many_clusters_as_units_is_the_sum():
    expected = np.einsum("n,nio->io", 3 * W, dense(bank()))
    np.testing.assert_allclose(dense(RUN(bank(), jnp.asarray(W), rank=6)), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"rank, steps: got 9, 10, expected 1 to 6 \(the pool\)"):
        RUN(bank(), jnp.asarray(W), rank=9)
    own = np.asarray(
        clusters(bank().u.mT.reshape(6, 6), bank().v.reshape(6, 5), jnp.ones(6), 6, 10)
    )
    np.testing.assert_array_equal(own.sum(0), 1)
    np.testing.assert_array_equal(own.sum(1), 1)


def test_equal_adapters_of_shuffled_units_are_one_adapter():
    """The paper's claim in small: averaging factors fails where the units are in another order."""
    b = bank(1, r=4, d_in=9, d_out=8)
    orders = [np.random.default_rng(k).permutation(4) for k in range(3)]
    assert any((o != orders[0]).any() for o in orders)
    mixed = LowRank(
        jnp.stack([b.u[0][:, o] for o in orders]), jnp.stack([b.v[0][o] for o in orders])
    )
    got = RUN(mixed, jnp.ones(3) / 3)
    np.testing.assert_allclose(dense(got), dense(b)[0], atol=1e-4)
    averaged = np.asarray(mixed.u).mean(0) @ np.asarray(mixed.v).mean(0)
    assert np.linalg.norm(averaged - dense(b)[0]) > 0.4 * np.linalg.norm(dense(b)[0])


def test_noisy_shuffled_copies_are_denoised():
    """Clusters find the common units: closer to them than any copy, where averages are far off."""
    rng = np.random.default_rng(4)
    b = bank(1, r=4, d_in=30, d_out=20)
    us, vs = [], []
    for _ in range(6):
        o = rng.permutation(4)
        us.append(np.asarray(b.u[0])[:, o] + 0.3 * rng.normal(size=(30, 4)))
        vs.append(np.asarray(b.v[0])[o] + 0.3 * rng.normal(size=(4, 20)))
    many = LowRank(*(jnp.asarray(np.stack(t), jnp.float32) for t in (us, vs)))
    truth = dense(b)[0]

    def far(x):
        return np.linalg.norm(x - truth) / np.linalg.norm(truth)

    got = far(dense(RUN(many, jnp.ones(6) / 6)))
    assert got < 0.6 * min(far(x) for x in dense(many))
    assert far(np.mean(us, 0) @ np.mean(vs, 0)) > 3 * got


def test_permutation_and_padding_do_not_matter():
    b, order = bank(), np.asarray([2, 0, 1])
    plain = dense(RUN(b, jnp.asarray(W)))
    shuffled = LowRank(b.u[order], b.v[order])
    np.testing.assert_allclose(dense(RUN(shuffled, jnp.asarray(W[order]))), plain, atol=1e-5)
    padded = LowRank(jnp.pad(b.u, ((0, 0), (0, 0), (0, 2))), jnp.pad(b.v, ((0, 0), (0, 2), (0, 0))))
    np.testing.assert_allclose(dense(RUN(padded, jnp.asarray(W), rank=2)), plain, atol=1e-5)
    one = LowRank(*(t[:1] for t in padded))
    np.testing.assert_allclose(dense(RUN(one, jnp.ones(1))), dense(one)[0], atol=1e-5)


def test_spectral_units_do_not_depend_on_the_basis():
    b, g = bank(), np.random.default_rng(1).normal(size=(3, 2, 2)).astype("f4")
    turned = LowRank(b.u @ g, jnp.linalg.inv(g) @ b.v)
    w = jnp.asarray(W)
    spectra = [dense(RUN(x, w, units="spectral")) for x in (b, turned)]
    np.testing.assert_allclose(*spectra, atol=1e-3)
    raw = [dense(RUN(x, w)) for x in (b, turned)]
    assert np.abs(raw[0] - raw[1]).max() > 0.1
    np.testing.assert_allclose(dense(spectral(b)), dense(b), atol=1e-5)


def test_spectral_value_by_numpy():
    """The units are singular vectors, the largest entry of each left one positive."""
    us, vs = [], []
    for d in dense(bank()):
        x, s, y = np.linalg.svd(d)
        x, s, y = x[:, :2], s[:2], y[:2]
        root = np.sign(x[np.abs(x).argmax(0), [0, 1]]) * np.sqrt(s)
        us, vs = [*us, x * root], [*vs, root[:, None] * y]
    for k in (1, 3):
        got = lego_spectral(bank(), jnp.asarray(W), rank=k)
        want = by_numpy(LowRank(np.stack(us), np.stack(vs)), W, k)
        np.testing.assert_allclose(dense(got), want, atol=1e-4)


def test_reweighting_restores_the_length_of_units():
    """Centroids are shorter than their members; with the factor they are as long on average."""
    plain, long = (RUN(bank(), jnp.ones(3) / 3, rank=1, reweight=r) for r in (False, True))
    ratio = np.linalg.norm(dense(long)) / np.linalg.norm(dense(plain))
    pool = np.concatenate([np.asarray(bank().u.mT), np.asarray(bank().v)], axis=2).reshape(6, -1)
    shrunk = np.linalg.norm(pool, axis=1).mean() / np.linalg.norm(pool.mean(0))
    np.testing.assert_allclose(ratio, np.sqrt(2) * shrunk**2, rtol=1e-4)
    other = RUN(bank(), jnp.ones(3) / 3, rank=1, norm="max")
    shrunk = np.abs(pool).max(1).mean() / np.abs(pool.mean(0)).max()
    ratio = np.linalg.norm(dense(other)) / np.linalg.norm(dense(plain))
    np.testing.assert_allclose(ratio, np.sqrt(2) * shrunk**2, rtol=1e-4)


def test_gradient_by_finite_differences():
    b, rng = bank(), np.random.default_rng(3)
    du, dw = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (b.u.shape, (3,)))

    @jax.jit
    def loss(t):
        out = lego(LowRank(b.u + t * du, b.v), jnp.asarray(W) + t * dw)
        return jnp.sum(jnp.sin(out.u @ out.v))

    h = 1e-2
    numeric = (loss(jnp.float32(h)) - loss(jnp.float32(-h))) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0)), numeric, rtol=2e-2)
    zero = LowRank(b.u.at[1].set(0.0), b.v)
    slope = jax.jit(jax.grad(lambda u: jnp.sum(lego(LowRank(u, zero.v), W).u ** 2)))(zero.u)
    assert np.isfinite(np.asarray(slope)).all()


def test_mutation_clusters_by_position(monkeypatch):
    """Unit k of every adapter in cluster k: the average of factors, which the claim refutes."""

    def by_position(a, b, live, k, steps):
        return jnp.asarray(np.eye(k)[np.arange(a.shape[0]) % k], a.dtype)

    monkeypatch.setattr(file, "clusters", by_position)
    fresh = jax.jit(lambda *args, **options: file.lego(*args, **options), static_argnames=STATIC)
    monkeypatch.setitem(globals(), "RUN", fresh)
    with pytest.raises(AssertionError):
        test_equal_adapters_of_shuffled_units_are_one_adapter()
    with pytest.raises(AssertionError):
        test_value_by_numpy(1 + 1)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"steps": -1}, {"units": "rows"}, {"norm": "l1"}])
def test_refusals(bad):
    with pytest.raises(ValueError, match="got"):
        lego(bank(), jnp.asarray(W), **bad)

"""Merges of whole tensors: corners that mergekit's golden files do not reach, by hand and NumPy."""

import numpy as np
import pytest

from jlora.cli.merge import sparsify, whole

RNG = np.random.default_rng(0)
X = [RNG.normal(size=(6, 5)).astype(np.float32) for _ in range(3)]


def test_of_equal_elements_the_first_are_kept():
    """Exactly as many as the density says, also where a threshold alone keeps more or none."""
    x = np.array([2, 1, 1, 3, 1, 1], np.float32)
    np.testing.assert_array_equal(sparsify.largest(x, 4), [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(sparsify.smallest(x, 3), [0, 1, 1, 0, 1, 0])
    assert not sparsify.largest(x, 0).any() and sparsify.largest(x, 6).all()
    flat = np.ones((4, 4), np.float32)
    kept = sparsify.magnitude(flat, np.abs(flat), 0.3)
    assert kept.sum() == int(0.3 * 16)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_outliers_keep_the_density(density):
    """The middle by magnitude; without room for gamma, the small ones too."""
    d = X[0]
    kept = sparsify.outliers(d, np.abs(d), density, 0.2)
    order = np.argsort(np.abs(d), axis=None)
    low = max(0, d.size - int(density * d.size) - int(0.2 * d.size))
    want = np.zeros(d.size, bool)
    want[order[low : low + int(density * d.size)]] = True
    np.testing.assert_array_equal(kept.ravel() != 0, want)


def test_blocks_make_no_difference(monkeypatch):
    options = {"weight": (0.5, 0.2, 0.3), "density": (0.5,) * 3, "vote": "sum", "normalize": True}
    one = whole.task_vectors(X, sparsify=sparsify.magnitude, **options)
    monkeypatch.setattr(whole, "BLOCK", 7)
    np.testing.assert_array_equal(
        whole.task_vectors(X, sparsify=sparsify.magnitude, **options), one
    )


def test_the_sign_of_most():
    """Two small values outvote a large one by count, not by sum."""
    x = [np.float32([[v]]) for v in (3.0, -1.0, -1.0)]
    weight = (1.0, 1.0, 1.0)
    for vote, want in (("sum", 3.0), ("count", -1.0)):
        got = whole.task_vectors(x, weight=weight, vote=vote, normalize=True)
        np.testing.assert_allclose(got, [[want]])
    with pytest.raises(ValueError, match="vote: got 'most', expected sum or count"):
        whole.task_vectors(x, weight=weight, vote="most")


def test_rescaled_to_the_l1_norm():
    rng = [np.random.default_rng(0)]
    got = whole.task_vectors(X[:1], weight=(1.0,), density=(0.4,), sparsify=sparsify.dropped,
                             rescale=True, rngs=rng)  # fmt: skip
    assert 0 < (got == 0).mean() < 1
    np.testing.assert_allclose(np.abs(got).sum(), np.abs(X[0]).sum(), rtol=1e-5)


def test_energies_that_vanish_count_alike():
    """mergekit's limit: mean squares below 1e-6 together are no energies."""
    tiny = [1e-5 * t for t in X]
    agree = np.sign(tiny) == np.where(np.sum(tiny, axis=0) >= 0, 1, -1)
    want = (agree * tiny).sum(0) / agree.sum(0)
    np.testing.assert_allclose(whole.sce(tiny), want, rtol=1e-5)


def test_magprune_keeps_by_rank_within_rows(monkeypatch):
    """Keep probabilities rise from density - epsilon to density + epsilon along each row."""
    seen = []
    keep_all = lambda rng, p: seen.append(p) or np.ones(p.shape, bool)  # noqa: E731
    monkeypatch.setattr(sparsify, "bernoulli", keep_all)
    sparsify.magprune(X[0], np.abs(X[0]), 0.5, 0.2, rng=np.random.default_rng(0))
    ranks = np.abs(X[0]).argsort(1).argsort(1)
    np.testing.assert_allclose(seen[0], 0.3 + 0.4 * ranks / 4, rtol=1e-6)
    with pytest.raises(ValueError, match="density \\+- epsilon"):
        sparsify.magprune(X[0], np.abs(X[0]), 0.9, 0.2, rng=np.random.default_rng(0))


def test_means_on_the_sphere():
    """Of orthogonal unit vectors: halfway, of unit norm; of equal ones: themselves."""
    a, b = np.float32([1, 0, 0]), np.float32([0, 1, 0])
    half = np.sqrt(0.5)
    for mean in (
        whole.slerp([a, b], t=0.5),
        whole.nuslerp([a, b], weight=(1, 1)),
        whole.multislerp([a, b], weight=(1, 1)),
        whole.karcher([a, b]),
    ):
        np.testing.assert_allclose(mean, [half, half, 0], atol=1e-6)
    np.testing.assert_allclose(whole.karcher([2 * a, 2 * a]), 2 * a, atol=1e-6)
    np.testing.assert_allclose(whole.slerp([a, 3 * a], t=0.25), 1.5 * a, atol=1e-6)
    np.testing.assert_array_equal(whole.karcher([0 * a, 0 * a]), 0 * a)
    with pytest.raises(ValueError, match="the weighted unit vectors cancel"):
        whole.multislerp([a, -a, 0 * a], weight=(1, 1, 1))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_tensors_of_any_shape(shape):
    x = [np.asarray(RNG.normal(size=shape), np.float32) for _ in range(2)]
    for got in (
        whole.task_vectors(x, weight=(1, 1), density=(0.5, 0.5), sparsify=sparsify.magnitude),
        whole.sce(x, select_topk=0.5),
        whole.model_stock(x, filter_wise=True),
        whole.slerp(x, t=0.3),
        whole.karcher(x),
        whole.linear(x, weight=(1, 2)),
        whole.multislerp(x, weight=(1, 2)),
    ):
        assert got.shape == shape and np.isfinite(got).all()

"""Duplicates, clusters and retrieval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster import hierarchy

from jlora import algebra
from jlora.algebra import LowRank
from jlora.retrieval import cluster, duplicates, retrieve


def grouped(noise=0.3, sizes=(2, 3, 1), seed=0):
    """A bank whose adapters are noisy copies of a few, in mixed order; and their true groups."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    u, v = rng.normal(size=(len(sizes), 8, 2)), rng.normal(size=(len(sizes), 2, 6))
    u = u[label] + noise * rng.normal(size=(len(label), 8, 2))
    low = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v[label], jnp.float32))
    return {"x": low}, label


def same(a, b):
    """One partition under two namings."""
    return np.array_equal(a[:, None] == a[None], b[:, None] == b[None])


def test_clusters_are_the_groups():
    bank, label = grouped()
    by_count, by_cosine = cluster(bank, count=3), cluster(bank, cosine=0.6)
    assert same(by_count, label) and same(by_cosine, label)
    assert by_count[0] == 0 and list(dict.fromkeys(by_count)) == [0, 1, 2]
    assert len(set(cluster(bank, count=6))) == 6 and len(set(cluster(bank, count=1))) == 1


def test_clusters_are_those_of_scipy():
    bank, _ = grouped(noise=3.0, sizes=(4, 4, 4), seed=2)
    s = np.asarray(algebra.similarity(bank), np.float64)
    tree = hierarchy.linkage((1 - s)[np.triu_indices(12, 1)], "average")
    for count in range(2, 12):
        want = hierarchy.fcluster(tree, count, "maxclust")
        assert same(cluster(bank, count=count), want), count


def test_mutation_single_linkage_is_seen():
    """The comparison above can fail: another linkage gives other clusters."""
    bank, _ = grouped(noise=3.0, sizes=(4, 4, 4), seed=2)
    s = np.asarray(algebra.similarity(bank), np.float64)
    tree = hierarchy.linkage((1 - s)[np.triu_indices(12, 1)], "single")
    wrong = [hierarchy.fcluster(tree, c, "maxclust") for c in range(2, 12)]
    assert not all(
        same(cluster(bank, count=c), w) for c, w in zip(range(2, 12), wrong, strict=True)
    )


def test_duplicates_ignore_gauge_and_scale(make):
    bank = make(n=4, r=2)
    g = jnp.asarray([[2.0, 1.0], [0.0, -1.0]])
    turned = LowRank(3 * bank.u[:1] @ g, jnp.linalg.inv(g) @ bank.v[:1])
    bank = {"x": jax.tree.map(lambda a, b: jnp.concatenate([a, b]), bank, turned)}
    np.testing.assert_array_equal(duplicates(bank), [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(np.unique(duplicates(bank)), [0, 1, 2, 3])
    assert (duplicates(bank, cosine=0.01) == 0).sum() >= 2


def test_retrieval_by_numpy_and_jitted():
    rng = np.random.default_rng(0)
    c, q = rng.normal(size=(5, 3)), rng.normal(size=3)
    got = jax.jit(lambda q, c: retrieve(q, c, count=2))(
        jnp.asarray(q, jnp.float32), jnp.asarray(c, jnp.float32)
    )
    cos = c @ q / np.linalg.norm(c, axis=1) / np.linalg.norm(q)
    order = np.argsort(-cos)[:2]
    np.testing.assert_array_equal(got.ids, order)
    np.testing.assert_allclose(got.scores, cos[order], rtol=1e-5)
    w = np.exp(cos[order] / 0.1)
    np.testing.assert_allclose(got.weights, w / w.sum(), rtol=1e-4)
    cold = retrieve(jnp.asarray(q, jnp.float32), jnp.asarray(c, jnp.float32), count=5,
                    temperature=1e-3)  # fmt: skip
    assert float(cold.weights[0]) > 0.99


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda b: cluster(b), "expected exactly one"),
        (lambda b: cluster(b, count=9), "count: got 9, expected 1 to 6"),
        (lambda b: duplicates(b, cosine=0.0), "cosine: got 0.0"),
        (lambda b: retrieve(jnp.ones(3), jnp.ones((4, 3)), count=5), "count: got 5"),
        (lambda b: retrieve(jnp.ones(3), jnp.ones((4, 3)), count=1, temperature=0.0), "temperat"),
    ],
    ids=["both", "count", "cosine", "retrieve", "temperature"],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(grouped()[0])

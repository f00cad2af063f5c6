"""Core space: lossless; the entrywise merge by numpy; the gauge does not matter."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.spectral.core_space import entrywise, from_core, largest, merge_core, to_core

W = np.array([0.5, 0.3, 0.2])
W32 = jnp.asarray(W, jnp.float32)


def ties(x, w, density):
    """Trim, elect, merge: x [N, ...], float64."""
    kept = np.zeros_like(x)
    for n, t in enumerate(x):
        order = np.argsort(-np.abs(t).ravel())[: max(1, round(density * t.size))]
        kept[n].flat[order] = t.flat[order]
    w = w.reshape(-1, *[1] * (x.ndim - 1))
    sign = np.where((w * kept).sum(0) >= 0, 1, -1)
    agree = w * (kept * sign > 0)
    total = agree.sum(0)
    return np.where(total != 0, (agree * kept).sum(0) / np.where(total != 0, total, 1), 0)


def core_space(bank, dense, density):
    """The official construction, on balanced factors."""
    us, vs = [], []
    for d in dense(bank):
        x, s, y = np.linalg.svd(d, full_matrices=False)
        r = bank.u.shape[-1]
        us.append(x[:, :r] * np.sqrt(s[:r]))
        vs.append(np.sqrt(s[:r])[:, None] * y[:r])
    left = np.linalg.svd(np.concatenate(us, 1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate(vs, 0), full_matrices=False)[2]
    cores = np.stack([left.T @ d @ right.T for d in dense(bank)])
    return left @ ties(cores, W, density) @ right


def check(function, make, dense):
    bank = make(d_in=10, d_out=9)
    want = core_space(bank, dense, 0.3)
    np.testing.assert_allclose(dense(function(bank, W32, density=0.3)), want, atol=1e-4)


def test_value_by_numpy(make, dense):
    check(merge_core, make, dense)


def test_mutation_other_bases_are_another_merge(make, dense):
    def plain(bank, w, density):
        core = to_core(bank)
        return from_core(core, entrywise(core.cores, w, "ties", density))

    with pytest.raises(AssertionError):
        check(plain, make, dense)


@pytest.mark.parametrize("shape", [{}, {"d_in": 4}, {"d_out": 3}, {"r": 5}])
def test_cores_lose_nothing(shape, make, dense):
    bank = make(**shape)
    core = to_core(bank)
    for n in range(3):
        np.testing.assert_allclose(dense(from_core(core, core.cores[n])), dense(bank)[n], atol=2e-5)
    p, q = core.cores.shape[1:]
    assert from_core(core, core.cores[0]).u.shape[-1] == min(p, q)
    np.testing.assert_allclose(core.left.T @ core.left, np.eye(p), atol=1e-6)


def test_the_sum_rule_is_the_exact_sum(make, dense):
    bank = make()
    want = np.einsum("n,nio->io", W, dense(bank))
    np.testing.assert_allclose(dense(merge_core(bank, W32, rule="sum")), want, atol=1e-5)


def test_ties_drops_a_conflict_that_a_sum_cancels():
    """The paper's claim in small: of +1 (weight .6) and -1 (weight .4) the elected sign stays."""
    x = jnp.asarray([[1.0, 1.0], [-1.0, 1.0]])
    got = entrywise(x, jnp.asarray([0.6, 0.4]), "ties", 1.0)
    np.testing.assert_allclose(got, [1.0, 1.0])
    np.testing.assert_allclose(entrywise(x, jnp.asarray([0.6, 0.4]), "sum", 1.0), [0.2, 1.0])


def test_largest_counts():
    x = jnp.asarray([3.0, -4.0, 0.5, 0.0])
    np.testing.assert_array_equal(largest(x, 0.5), [1, 1, 0, 0])
    np.testing.assert_array_equal(largest(x, 0.01), [0, 1, 0, 0])
    np.testing.assert_array_equal(largest(x, 0.5, jnp.asarray(2.0)), [0, 1, 0, 0])
    np.testing.assert_array_equal(largest(x, 0.6, jnp.asarray(3.0)), [1, 1, 0, 0])  # 1.8 is 2
    np.testing.assert_array_equal(largest(x, 0.6), [1, 1, 0, 0])


def test_one_density_for_each_adapter():
    x = jnp.asarray([[3.0, 1.0, 2.0], [5.0, -1.0, 4.0]])
    got = entrywise(x, jnp.ones(2), "ties", (0.4, 1.0))
    np.testing.assert_allclose(got, [4.0, -1.0, 4.0])


@pytest.mark.parametrize(
    "bad, text",
    [({"rule": "mean"}, "rule: got 'mean'"), ({"density": 0.0}, "density: got 0.0")],
)
def test_bad_arguments(bad, text, make):
    with pytest.raises(ValueError, match=text):
        merge_core(make(), W32, **bad)


def test_zero_padding_changes_nothing_in_the_cores(make, dense):
    bank = make()
    padded = LowRank(
        jnp.pad(bank.u, [(0, 0), (0, 0), (0, 2)]), jnp.pad(bank.v, [(0, 0), (0, 2), (0, 0)])
    )
    core = to_core(padded)
    np.testing.assert_allclose(dense(from_core(core, core.cores[1])), dense(bank)[1], atol=1e-5)

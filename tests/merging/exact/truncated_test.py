"""The cut sum against a dense SVD: value, exact error, ranks, and a merge vmapped over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.merging import apply, lookup
from jlora.merging.exact.truncated import truncated, truncation_error

W = jnp.asarray([0.5, 0.3, 0.2])


def best(bank, w, k, dense):
    total = np.einsum("n,nio->io", np.asarray(w, np.float64), dense(bank))
    x, s, y = np.linalg.svd(total, full_matrices=False)
    return (x[:, :k] * s[:k]) @ y[:k], np.sqrt((s[k:] ** 2).sum())


def check(function, make, dense, k=2):
    bank = make()
    want, error = best(bank, W, k, dense)
    np.testing.assert_allclose(dense(function(bank, W, rank=k)), want, atol=1e-5)
    np.testing.assert_allclose(truncation_error(bank, W, rank=k), error, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_value_and_error_by_dense_svd(k, make, dense):
    check(truncated, make, dense, k)


def test_mutation_the_largest_adapter_is_not_the_best_rank(make, dense):
    with pytest.raises(AssertionError):
        check(lambda b, w, rank: jax.tree.map(lambda t: t[0], b), make, dense)


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_fewer_are_kept_at_one_shape(keep, make, dense):
    bank, k = make(), min(keep, 3)
    low = truncated(bank, W, rank=3, keep=keep)
    want, error = best(bank, W, k, dense)
    assert low.u.shape == (8, 3)
    np.testing.assert_allclose(dense(low), want, atol=1e-5)
    np.testing.assert_allclose(truncation_error(bank, W, rank=3, keep=keep), error, rtol=1e-5)


def test_full_rank_is_exact_and_factors_are_balanced(make, dense):
    bank = make()
    low = truncated(bank, W, rank=6)
    assert low.u.shape == (8, 6)
    np.testing.assert_allclose(dense(low), best(bank, W, 6, dense)[0], atol=1e-5)
    np.testing.assert_allclose(low.u.T @ low.u, low.v @ low.v.T, atol=1e-4)


def test_gradient_by_differences(make, dense):
    """With respect to weights and factors, through the cut."""
    bank, probe = make(), np.random.default_rng(5).normal(size=(8, 6))

    def f(bank, w):
        low = truncated(bank, w, rank=2)
        return jnp.sum(low.u @ low.v * jnp.asarray(probe, jnp.float32))

    step = make(seed=9)
    dw = jnp.asarray([1.0, -0.5, 0.2])
    _, got = jax.jvp(f, (bank, W), (step, dw))
    h = 1e-4
    ends = []
    for sign in (h, -h):
        moved = jax.tree.map(lambda t, d, s=sign: np.float64(t) + s * np.float64(d), bank, step)
        w = np.asarray(W, np.float64) + sign * np.asarray(dw)
        ends.append((best(moved, w, 2, dense)[0] * probe).sum())
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * h), rtol=1e-3)


def test_vmapped_over_coefficients_and_ranks_in_one_jit(world):
    """Layers, coefficients and ranks: one program; each result is that of its own merge."""
    row, traces = lookup("truncated"), []

    @jax.jit
    def many(bank, ws, ranks):
        traces.append(1)

        def one(w, k):
            return apply(row, bank, w, {"rank": 6, "keep": k}, jit=False)

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(ws, ranks)

    ws = jnp.asarray([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    ranks = jnp.asarray([1, 3, 6])
    out = many(world.bank, ws, ranks)
    many(world.bank, 2 * ws, ranks - 1)
    assert len(traces) == 1
    for i, j in ((0, 1), (1, 0), (1, 2)):
        want = jl.algebra.truncate(jl.algebra.combine(world.bank, ws[i]), int(ranks[j])).deltas
        got = jax.tree.map(lambda t, i=i, j=j: t[i, j], out)
        assert float(jl.algebra.distance(got, want)) < 1e-4 * float(jl.algebra.norm(want))


def test_rank_below_one(make):
    with pytest.raises(ValueError, match="rank: got 0"):
        truncated(make(), W, rank=0)

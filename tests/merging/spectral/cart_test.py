"""CART by numpy; its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.merging.exact.concat import concat
from jlora.merging.spectral.cart import cart

W = np.array([0.5, 0.3, 0.2])
W32 = jnp.asarray(W, jnp.float32)


def by_numpy(deltas, w, k, scale):
    mean = np.einsum("n,nio->io", w, deltas)
    total = mean.copy()
    for d in deltas:
        x, s, y = np.linalg.svd(d - mean, full_matrices=False)
        total += scale * (x[:, :k] * s[:k]) @ y[:k]
    return total


def check(function, make, dense, **options):
    bank = make(d_in=9, d_out=8)
    k = options.get("rank") or 1  # 8 % of 8, rounded up
    want = by_numpy(dense(bank), W, k, options.get("scale", 1.0))
    np.testing.assert_allclose(dense(function(bank, W32, **options)), want, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "scale": 0.3}], ids=str)
def test_value_by_numpy(options, make, dense):
    check(cart, make, dense, **options)


def test_the_default_rank_is_eight_percent_rounded_up(make, dense):
    bank = make(d_in=30, d_out=40, r=3)
    want = by_numpy(dense(bank), W, 3, 1.0)  # 8 % of 30 is 2.4
    np.testing.assert_allclose(dense(cart(bank, W32)), want, atol=1e-4)


def test_mutation_the_mean_alone_is_another_merge(make, dense):
    with pytest.raises(AssertionError):
        check(concat, make, dense)


def test_limits(make, dense):
    """scale 0: the mean. Full rank, scale 1/N, equal weights: the mean again."""
    bank, third = make(), jnp.full(3, 1 / 3)
    for w, options in ((W32, {"scale": 0.0}), (third, {"rank": 6, "scale": 1 / 3})):
        want = dense(concat(bank, w))
        np.testing.assert_allclose(dense(cart(bank, w, **options)), want, atol=1e-5)


def test_each_task_is_nearer_than_to_the_mean(make, dense):
    """The claim in small: with low-rank parts a task's own directions come back."""
    bank, third = make(d_in=20, d_out=20), jnp.full(3, 1 / 3)
    merged, mean = dense(cart(bank, third, rank=2)), dense(concat(bank, third))
    for d in dense(bank):
        x, _, y = np.linalg.svd(d)
        x, y = x[:, :2], y[:2]
        far = [np.linalg.norm(x.T @ (m - d) @ y.T) for m in (merged, mean)]
        assert far[0] < far[1]


def test_bad_rank(make):
    with pytest.raises(ValueError, match="rank: got 0"):
        cart(make(), W32, rank=0)

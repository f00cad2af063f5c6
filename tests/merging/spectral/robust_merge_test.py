"""RobustMerge by numpy, as the official code does it, on balanced factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.spectral.core_space import largest
from jlora.merging.spectral.robust_merge import canonical, robust_merge

W = np.array([1.0, 0.5, 2.0])
W32 = jnp.asarray(W, jnp.float32)


def factors(d, r):
    x, s, y = np.linalg.svd(d, full_matrices=False)
    sign = np.sign(x[np.abs(x).argmax(0), np.arange(x.shape[1])])[:r]
    return x[:, :r] * sign * np.sqrt(s[:r]), (sign * np.sqrt(s[:r]))[:, None] * y[:r]


def pruned(t, density):
    out = np.zeros_like(t)
    order = np.argsort(-np.abs(t).ravel())[: max(1, round(density * t.size))]
    out.flat[order] = t.flat[order]
    return out


def by_numpy(deltas, r, density, floor):
    a, b, s = 0.0, 0.0, []
    for d in deltas:
        left, _ = factors(d, r)
        kept = np.abs(pruned(left, density)).sum(0)
        got = np.where(kept > 0, np.abs(left).sum(0) / np.where(kept > 0, kept, 1), 1)
        s.append(np.maximum(got, np.sort(got)[int(r * floor)]))
    for d, w, c in zip(deltas, W, s, strict=True):
        left, right = factors(d, r)
        a = a + w * pruned(left, density)
        b = b + w * c[:, None] * pruned(right, density)
    return a @ (b / np.sum(s, axis=0)[:, None])


def check(function, make, dense, density=0.5, floor=0.4):
    bank = make(d_in=9, d_out=8, r=3)
    want = by_numpy(dense(bank), 3, density, floor)
    np.testing.assert_allclose(dense(function(bank, W32)), want, atol=1e-4)


def test_value_by_numpy(make, dense):
    check(lambda b, w: robust_merge(b, w, density=0.5, floor=0.4), make, dense)


def test_a_direction_of_which_nothing_is_left_counts_once(make, dense):
    """Two entries of 27 leave none of some directions; the slope is finite there too."""

    def few(b, w):
        return robust_merge(b, w, density=0.08, floor=0.0)

    bank = make(d_in=9, d_out=8, r=3)
    assert any((pruned(factors(d, 3)[0], 0.08) == 0).all(0).any() for d in dense(bank))
    check(few, make, dense, 0.08, 0.0)
    slopes = jax.grad(lambda b: jnp.sum(jnp.sin(few(b, W32).v)))(bank)
    assert all(np.isfinite(t).all() for t in jax.tree.leaves(slopes))


def test_mutation_without_the_rescaling(make, dense):
    def plain(bank, w):
        a, b, _ = canonical(bank)
        a = jnp.stack([t * largest(t, 0.5) for t in a])
        b = jnp.stack([t * largest(t, 0.5) for t in b])
        return LowRank(jnp.einsum("n,nij->ij", w, a), jnp.einsum("n,nij->ij", w, b) / 3)

    with pytest.raises(AssertionError):
        check(plain, make, dense)


def test_one_adapter_of_which_nothing_is_pruned_is_itself(make, dense):
    bank = make(n=1)
    got = robust_merge(bank, jnp.ones(1), density=1.0)
    np.testing.assert_allclose(dense(got), dense(bank)[0], atol=1e-5)


def test_pruning_is_made_up_for_in_small_directions(make):
    """The claim: no direction is enlarged less than the floor, weak ones most."""
    bank = make(d_in=30, r=4)
    a, _, _ = canonical(bank)
    kept = jnp.stack([jnp.abs(t * largest(t, 0.2)).sum(0) / jnp.abs(t).sum(0) for t in a])
    assert float(kept[:, 0].min()) > float(kept[:, -1].max())


def test_who_loses_more_by_pruning_is_enlarged_more(dense):
    """The claim: two adapters, one written in few rows, one spread over all. Of equal size and
    weight, the second loses to the mask what its scale gives back; without the scale, nothing is.
    """
    u = np.zeros((2, 16, 1))
    u[0, :4, 0], u[1, :, 0] = [2.0, -1.0, 3.0, 1.5], np.linspace(0.5, 2.0, 16)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    bank = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(np.eye(2, 6)[:, None], jnp.float32))
    got = np.linalg.norm(dense(robust_merge(bank, jnp.ones(2), density=0.5)), axis=0)
    scale = np.abs(u[1]).sum() / np.sort(np.abs(u[1]).ravel())[8:].sum()
    np.testing.assert_allclose(got[1] / got[0], scale, rtol=1e-4)
    assert scale > 1.3 and np.all(got[2:] == 0)


def test_padding_does_not_matter(make, dense):
    bank = make(d_in=9, d_out=8, r=3)
    more = LowRank(
        jnp.pad(bank.u, [(0, 0), (0, 0), (0, 2)]), jnp.pad(bank.v, [(0, 0), (0, 2), (0, 0)])
    )
    want = dense(robust_merge(bank, W32, density=0.5))
    np.testing.assert_allclose(dense(robust_merge(more, W32, density=0.5)), want, atol=1e-5)


@pytest.mark.parametrize("bad", [{"density": 1.5}, {"floor": 1.0}])
def test_bad_arguments(bad, make):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        robust_merge(make(), W32, **bad)

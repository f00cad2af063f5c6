"""Isotropic merges by numpy, as the official code does them, in the span of the adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.merging.exact.concat import concat
from jlora.merging.spectral.iso import iso_c, iso_cts

ONE = jnp.ones(3)


def polar(m):
    x, _, y = np.linalg.svd(m, full_matrices=False)
    return x @ y


def c_by_numpy(deltas, k):
    x, s, y = np.linalg.svd(deltas.sum(0), full_matrices=False)
    return s[:k].mean() * x[:, :k] @ y[:k]


def cts_by_numpy(deltas, k, common):
    n = len(deltas)
    own = round((k - int(k * common)) / n)
    c = k - n * own
    x, s, y = np.linalg.svd(deltas.sum(0), full_matrices=False)
    x, s, y = x[:, :c], s[:c], y[:c]
    xs, ss, ys = [x], [s], [y]
    for d in deltas:
        a, b, e = np.linalg.svd(d - x @ x.T @ d, full_matrices=False)
        xs, ss, ys = [*xs, a[:, :own]], [*ss, b[:own]], [*ys, e[:own]]
    x, y = polar(np.concatenate(xs, 1)), polar(np.concatenate(ys, 0))
    return np.concatenate(ss).mean() * x @ y


def check_c(function, make, dense):
    bank = make(d_in=9, d_out=8)
    np.testing.assert_allclose(dense(function(bank, ONE)), c_by_numpy(dense(bank), 6), atol=1e-4)


def check_cts(function, make, dense, common=0.5):
    bank = make(d_in=9, d_out=8)
    want = cts_by_numpy(dense(bank), 6, common)
    np.testing.assert_allclose(dense(function(bank, ONE, common=common)), want, atol=1e-4)


def test_iso_c_by_numpy(make, dense):
    check_c(iso_c, make, dense)


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_iso_cts_by_numpy(common, make, dense):
    check_cts(iso_cts, make, dense, common)


def test_mutations(make, dense):
    with pytest.raises(AssertionError):
        check_c(concat, make, dense)
    with pytest.raises(AssertionError):
        check_cts(lambda b, w, common: iso_c(b, w), make, dense)


def test_with_a_common_space_only_cts_is_c(make, dense):
    bank = make()
    got, want = iso_cts(bank, ONE, common=1.0), iso_c(bank, ONE)
    np.testing.assert_allclose(dense(got), dense(want), atol=1e-4)


def test_the_spectrum_is_flat_and_the_rank_is_kept(make, dense):
    bank = make(n=2, d_in=9, d_out=8)
    s = np.linalg.svd(dense(iso_c(bank, jnp.ones(2))), compute_uv=False)
    np.testing.assert_allclose(s[:4], s[0], rtol=1e-4)
    assert s[4] < 1e-5
    twice = jax.tree.map(lambda t: jnp.stack([t[0], t[0]]), bank)  # dependent: rank 2 of 4
    s = np.linalg.svd(dense(iso_c(twice, jnp.ones(2))), compute_uv=False)
    total = np.linalg.svd(2 * dense(bank)[0], compute_uv=False)
    np.testing.assert_allclose(s[:2], total[:2].mean(), rtol=1e-4)
    assert s[2] < 1e-4


def test_weak_tasks_are_better_aligned_than_in_the_sum(make, dense):
    """The claim: a task that the sum drowns keeps its directions."""
    bank = make(d_in=9, d_out=8)
    bank = bank._replace(u=bank.u.at[0].multiply(0.1))
    weak = dense(bank)[0] / np.linalg.norm(dense(bank)[0])

    def share(m):
        return (m * weak).sum() / np.linalg.norm(m)

    assert share(dense(iso_c(bank, ONE))) > 1.5 * share(dense(concat(bank, ONE)))


def test_own_spaces_keep_a_weak_task_where_many_are_crowded(make, dense):
    """The claim for CTS: six tasks fill all directions; the sum's flat spectrum loses the weak one.

    Cosine of the merge to the weak task, the mean of five worlds.
    """
    gain = []
    for seed in range(5):
        bank = make(seed=seed, n=6, d_in=9, d_out=8)
        bank = bank._replace(u=bank.u.at[0].multiply(0.1))
        weak = dense(bank)[0] / np.linalg.norm(dense(bank)[0])
        merged = [dense(iso_cts(bank, jnp.ones(6), common=c)) for c in (0.25, 1.0)]
        share = [(m * weak).sum() / np.linalg.norm(m) for m in merged]
        gain.append(share[0] - share[1])
    assert np.mean(gain) > 0.1


@pytest.mark.parametrize("function", [iso_c, iso_cts])
def test_gradient_by_differences(function, make, dense):
    bank, probe = make(d_in=9, d_out=8), np.random.default_rng(3).normal(size=(9, 8))
    step = make(seed=5, d_in=9, d_out=8)

    def f(b):
        low = function(b, ONE)
        return jnp.sum(low.u @ low.v * jnp.asarray(probe, jnp.float32))

    got = jax.jvp(f, (bank,), (step,))[1]
    h, ends = 1e-4, []
    for sign in (h, -h):
        moved = [np.float64(t) + sign * np.float64(d) for t, d in zip(bank, step, strict=True)]
        deltas = moved[0] @ moved[1]
        m = c_by_numpy(deltas, 6) if function is iso_c else cts_by_numpy(deltas, 6, 0.8)
        ends.append((m * probe).sum())
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * h), rtol=5e-3)


def test_bad_common(make):
    with pytest.raises(ValueError, match="common: got 2"):
        iso_cts(make(), ONE, common=2.0)


def test_adapters_of_one_basis_get_no_directions_of_noise(make, dense):
    """They share their first factor: nothing outside of its span, whatever their order."""
    bank = make(d_in=9, d_out=8)
    bank = bank._replace(u=jnp.broadcast_to(bank.u[:1], bank.u.shape))
    merged, q = dense(iso_cts(bank, ONE)), np.linalg.qr(bank.u[0])[0]
    size = np.linalg.norm(merged)
    assert np.linalg.norm(merged - q @ (q.T @ merged)) < 1e-4 * size
    other = dense(iso_cts(jax.tree.map(lambda t: jnp.roll(t, 1, axis=0), bank), ONE))
    assert np.linalg.norm(merged - other) < 1e-4 * size

"""The common basis by numpy: what it keeps, what projection is, and adapters that are unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.styles import basis

RANDOM = np.random.default_rng(0)
N, LAYERS, D, R, OUT = 3, 2, 7, 2, 5
A = RANDOM.normal(size=(N, LAYERS, D, R)).astype(np.float32)
B = RANDOM.normal(size=(N, LAYERS, R, OUT)).astype(np.float32)
SCALE = 2.0
DELTAS = SCALE * A @ B


def adapter(a, b, scale):
    return jl.Adapter({"x": {"a": a, "b": b}}, {"x": {"scale": scale}}, ())


BANK = adapter(jnp.asarray(A), jnp.asarray(B), jnp.full((N, LAYERS), SCALE))
ONE = adapter(BANK.trainable["x"]["a"][1], BANK.trainable["x"]["b"][1], jnp.full((LAYERS,), SCALE))


def target(rank):
    leaves = {"a": jnp.zeros((LAYERS, D, rank)), "scale": jnp.ones((LAYERS,))}
    return jl.Adapter({"x": {"b": jnp.zeros((LAYERS, rank, OUT))}}, {"x": leaves}, ())


def delta(found):
    return np.asarray(found.frozen["x"]["a"] @ found.trainable["x"]["b"])


@pytest.mark.parametrize("rank", [3, 6])
def test_it_is_the_best_basis_of_all_deltas(rank):
    common, kept = basis.fit(BANK, target(rank))
    q = np.asarray(common.frozen["x"]["a"])
    for layer in range(LAYERS):
        wide = np.concatenate(DELTAS[:, layer], axis=1)
        u, s, _ = np.linalg.svd(wide, full_matrices=False)
        np.testing.assert_allclose(
            q[layer] @ q[layer].T, u[:, :rank] @ u[:, :rank].T, atol=5e-4
        )  # the same space, whatever the signs
        share = (s[:rank] ** 2).sum() / (s**2).sum()
        assert float(kept["x"][layer]) == pytest.approx(share, abs=1e-5)
        assert (share > 0.9999) == (rank == N * R)
    found = delta(basis.project(common, ONE))
    np.testing.assert_allclose(found, q @ (q.swapaxes(1, 2) @ DELTAS[1]), atol=1e-4)
    if rank == N * R:  # nothing is lost
        np.testing.assert_allclose(found, DELTAS[1], atol=1e-4)
    else:
        assert np.abs(found - DELTAS[1]).max() > 0.1


def test_sums_of_projected_adapters_are_sums_of_deltas():
    common, _ = basis.fit(BANK, target(6))
    inside = jax.vmap(lambda one: basis.project(common, one).trainable)(BANK)
    mean = common.replace(trainable=jax.tree.map(lambda x: x.mean(0), inside))
    np.testing.assert_allclose(delta(mean), DELTAS.mean(0), atol=1e-4)
    factors = SCALE * A.mean(0) @ B.mean(0)  # what averaged factors would give
    assert np.abs(factors - DELTAS.mean(0)).max() > 0.1


def test_a_basis_wider_than_a_site_is_refused():
    with pytest.raises(ValueError, match="basis: got 8, expected at most 7, the inputs of x"):
        basis.fit(BANK, target(8))

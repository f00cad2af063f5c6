"""Client banks of one site."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank


@pytest.fixture
def clients():
    """make(n, ranks) -> (bank, u, v, shares): ranks zero-padded, float64 copies by numpy."""

    def make(ranks=(3, 3, 3, 3), d_in=7, d_out=6, seed=0):
        rng, n, r = np.random.default_rng(seed), len(ranks), max(ranks)
        live = (np.arange(r) < np.asarray(ranks)[:, None]).astype("f8")
        u = rng.normal(size=(n, d_in, r)) * live[:, None, :]
        v = rng.normal(size=(n, r, d_out)) * live[:, :, None]
        p = rng.uniform(0.5, 1.5, n)
        p = p / p.sum()
        bank = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))
        return bank, u, v, p.astype("f4")

    return make

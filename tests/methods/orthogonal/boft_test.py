"""BOFT: butterflies from dense matrices by numpy, what they keep, and how far they reach."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.methods.orthogonal import boft
from jlora.methods.orthogonal.boft import BOFT
from jlora.methods.orthogonal.oft import OFT


def rotation(r, n):
    """M [d, d] by loops: every factor a dense matrix between its permutation and its transpose."""
    stages, count = r.shape[:2]
    d, half = count * n, n // 2
    total = np.eye(d)
    for i in range(stages):
        middle, deal = np.zeros((d, d)), np.zeros((d, d))
        for k in range(count):
            q = (r[i, k] - r[i, k].T) / 2
            block = (np.eye(n) - q) @ np.linalg.inv(np.eye(n) + q)
            middle[k * n : k * n + n, k * n : k * n + n] = block
        row = 0
        for chunk in range(0, d, 2**i * n):
            groups = range(chunk, chunk + 2**i * n, max(half, 1))
            order = list(groups)[0::2] + list(groups)[1::2] if i else list(groups)
            for start in order:
                for c in range(start, start + max(half, 1)):
                    deal[row, c] = 1
                    row += 1
        total = deal @ middle @ deal.T @ total
    return total


def check_value(bench, method):
    adapter = bench.noisy(method)
    p = bench.numbers(adapter)
    bench.agree(adapter, rotation(p["r"], method.block) @ bench.w * p["s"])


@pytest.mark.parametrize("method", [BOFT(block=4), BOFT(block=2, stages=2), BOFT(6, stages=2)])
def test_value(bench, method):
    check_value(bench, method)


def test_limit_one_factor_is_oft(bench):
    adapter = bench.noisy(BOFT(block=4))
    r = bench.numbers(adapter)["r"][0]
    rows, cols = np.triu_indices(4, 1)
    q = jnp.asarray(-((r - np.swapaxes(r, 1, 2)) / 2)[:, rows, cols], jnp.float32)
    w = bench.params["w"]
    p = {"r": adapter.trainable["w"]["r"], "s": jnp.ones(8)}
    ours, theirs = BOFT(block=4).merge(w, p), OFT(block=4, terms=None).merge(w, {"q": q})
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(np.asarray(ours) - bench.w).max() > 0.1


def test_claim_a_butterfly_of_few_numbers_is_orthogonal_and_reaches_all_inputs():
    d, n = 16, 2
    rng = np.random.default_rng(0)

    def made(stages):
        r = jnp.asarray(rng.normal(size=(stages, d // n, n, n)), jnp.float32)
        return np.asarray(BOFT(n, stages).merge(jnp.eye(d), {"r": r, "s": jnp.ones(d)}))

    for stages in (1, 2, 3, 4):
        m = made(stages)
        np.testing.assert_allclose(m @ m.T, np.eye(d), atol=1e-5)
        assert (np.abs(m) > 1e-7).sum() == d * n * 2 ** (stages - 1)  # each stage doubles the reach
    numbers = 4 * d // n * (n * (n - 1) // 2)
    assert numbers == 32 < d * (d - 1) // 2  # of one dense block


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"w: .* block = 10 expected to divide d_in, got 12"):
        bench.fresh(BOFT(block=10))
    with pytest.raises(ValueError, match=r"BOFT\.block: expected at least 2, got 1"):
        BOFT(block=1)
    with pytest.raises(ValueError, match=r"BOFT\.stages: expected at least 1, got 0"):
        BOFT(stages=0)
    with pytest.raises(ValueError, match="expected even with 2 stages: 3"):
        BOFT(block=3, stages=2)


def test_mutation_a_butterfly_that_deals_nothing_is_seen(bench, monkeypatch):
    monkeypatch.setattr(boft, "butterfly_permutation", lambda size, block, i: np.arange(size))
    with pytest.raises(AssertionError):
        check_value(bench, BOFT(block=2, stages=2))

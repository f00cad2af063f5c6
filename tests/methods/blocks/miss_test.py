"""MiSS: shared rows, also where the rank does not divide the inputs, and LoRA in disguise."""

import numpy as np
import pytest

from jlora.methods.blocks.miss import MiSS


def delta(d, d_in, d_out):
    rows, columns = d.shape
    return np.array([[d[i % rows, o % columns] for o in range(d_out)] for i in range(d_in)])


def check_value(bench, method):
    adapter = bench.noisy(method)
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter)["d"], 12, 8))


@pytest.mark.parametrize("method", [MiSS(rank=4), MiSS(rank=5), MiSS(rank=3, mini=2)])
def test_value(bench, method):
    check_value(bench, method)


def test_limit_all_rows_of_their_own_is_any_delta(bench):
    adapter = bench.noisy(MiSS(rank=12))
    bench.agree(adapter, bench.w + bench.numbers(adapter)["d"])


def test_rank_and_count(bench):
    adapter = bench.noisy(MiSS(rank=2))
    assert adapter.trainable["w"]["d"].shape == (2, 8) and not adapter.frozen["w"]
    assert np.linalg.matrix_rank(bench.merged(adapter) - bench.w, tol=1e-4) == 2


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"MiSS\.rank: got 0, expected an integer of at least 1"):
        MiSS(rank=0)
    with pytest.raises(ValueError, match="w: MiSS rank: got 13, expected at most d_in = 12"):
        bench.fresh(MiSS(rank=13))
    with pytest.raises(ValueError, match="w: MiSS mini: got 3, expected a divisor of d_out = 8"):
        bench.fresh(MiSS(rank=2, mini=3))


def test_mutation_neighbours_instead_of_strides_are_seen(bench, monkeypatch):
    import jax.numpy as jnp

    monkeypatch.setattr(
        MiSS, "merge", lambda self, w, p: w + jnp.repeat(p["d"], 12 // self.rank, axis=0)
    )
    with pytest.raises(AssertionError):
        check_value(bench, MiSS(rank=4))

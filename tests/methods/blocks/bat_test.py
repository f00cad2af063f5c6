"""BAT: the blocks one by one, full rank, and its inverse."""

import numpy as np
import pytest

from jlora.methods.blocks.bat import BAT


def transformed(w, b):
    n, out = b.shape[1], w.copy()
    for p in range(0, w.shape[0], n):
        for q in range(0, w.shape[1], n):
            block = w[p : p + n, q : q + n]
            out[p : p + n, q : q + n] = (np.eye(n) + b[q // n]) @ block + b[q // n]
    return out


def check_value(bench):
    adapter = bench.noisy(BAT(block=4))
    bench.agree(adapter, transformed(bench.w, bench.numbers(adapter)["b"]))


def test_value(bench):
    check_value(bench)


def test_full_rank_and_undone_by_the_inverse(bench):
    adapter = bench.noisy(BAT(block=4))
    merged, b = bench.merged(adapter), bench.numbers(adapter)["b"]
    assert np.linalg.matrix_rank(merged - bench.w, tol=1e-4) == 8
    got = np.concatenate(
        [
            np.concatenate(
                [
                    np.linalg.solve(np.eye(4) + b[q], merged[p : p + 4, 4 * q : 4 * q + 4] - b[q])
                    for q in range(2)
                ],
                axis=1,
            )
            for p in range(0, 12, 4)
        ]
    )
    np.testing.assert_allclose(got, bench.w, atol=1e-4)


def test_limit_of_blocks_of_one_scales_and_shifts_columns(bench):
    adapter = bench.noisy(BAT(block=1))
    b = bench.numbers(adapter)["b"][:, 0, 0]
    bench.agree(adapter, (1 + b) * bench.w + b)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"BAT\.block: got 0, expected an integer of at least 1"):
        BAT(block=0)
    why = "w: BAT block: got 6, expected a divisor of d_in = 12 and d_out = 8"
    with pytest.raises(ValueError, match=why):
        bench.fresh(BAT(block=6))


def test_mutation_without_the_weight_is_seen(bench, monkeypatch):
    import jax.numpy as jnp

    def plain(self, w, p):
        return w + jnp.tile(jnp.concatenate(list(p["b"]), axis=1), (3, 1))

    monkeypatch.setattr(BAT, "merge", plain)
    with pytest.raises(AssertionError):
        check_value(bench)

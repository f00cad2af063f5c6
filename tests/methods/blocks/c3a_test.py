"""C3A: circulant blocks entry by entry, against the Fourier transform."""

import numpy as np
import pytest

from jlora.methods.blocks.c3a import C3A


def delta(kernel):
    m, n, b = kernel.shape
    out = np.zeros((n * b, m * b))
    for i in range(n * b):
        for o in range(m * b):
            out[i, o] = kernel[o // b, i // b, (i % b - o % b) % b]
    return out / (n * b)


def check_value(bench, block=4):
    adapter = bench.noisy(C3A(block=block), size=3.0)
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter)["kernel"]))


def test_value(bench):
    check_value(bench)


def test_limit_blocks_of_one_are_any_delta(bench):
    adapter = bench.noisy(C3A(block=1))
    kernel = bench.numbers(adapter)["kernel"][..., 0]
    bench.agree(adapter, bench.w + kernel.T / 12)


def test_a_shifted_input_is_a_shifted_output(bench):
    adapter = bench.noisy(C3A(block=4), size=3.0)
    change = bench.merged(adapter) - bench.w
    turned = np.roll(change.reshape(3, 4, 2, 4), 1, axis=(1, 3)).reshape(12, 8)
    np.testing.assert_allclose(turned, change, atol=1e-6)
    assert np.linalg.matrix_rank(change, tol=1e-5) == 8


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"C3A\.block: got 0, expected an integer of at least 1"):
        C3A(block=0)
    why = "w: C3A block: got 6, expected a divisor of d_in = 12 and d_out = 8"
    with pytest.raises(ValueError, match=why):
        bench.fresh(C3A(block=6))


def test_mutation_the_shift_the_other_way_is_seen(bench, monkeypatch):
    good = C3A.apply

    def mirrored(self, x, w, p, ctx):
        kernel = p["kernel"]
        return good(self, x, w, {"kernel": kernel[..., (-np.arange(kernel.shape[-1])) % 4]}, ctx)

    monkeypatch.setattr(C3A, "apply", mirrored)
    with pytest.raises(AssertionError):
        check_value(bench)

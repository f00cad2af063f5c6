"""GraLoRA: block by block, its rank, and LoRA where there is one block."""

import numpy as np
import pytest

from jlora.methods.blocks.gralora import GraLoRA


def delta(p, k):
    a, b = p["a"], p["b"]
    rows, columns, part = a.shape[1], b.shape[2], a.shape[2] // k
    out = np.zeros((k * rows, k * columns))
    for n in range(k):
        for m in range(k):
            left = a[n][:, m * part : (m + 1) * part]
            right = b[m][n * part : (n + 1) * part]
            out[n * rows : (n + 1) * rows, m * columns : (m + 1) * columns] = left @ right
    if "a_all" in p:
        out += p["a_all"] @ p["b_all"]
    return p["scale"] * out


def check_value(bench, method):
    adapter = bench.noisy(method)
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter), method.blocks))


@pytest.mark.parametrize(
    "method", [GraLoRA(rank=4, alpha=6.0), GraLoRA(rank=4, blocks=4, hybrid=1)]
)
def test_value(bench, method):
    check_value(bench, method)


def test_limit_one_block_is_lora(bench):
    adapter = bench.noisy(GraLoRA(rank=3, alpha=6.0, blocks=1))
    p = bench.numbers(adapter)
    bench.agree(adapter, bench.w + 2.0 * p["a"][0] @ p["b"][0])


def test_k_blocks_have_k_times_the_rank(bench):
    adapter = bench.noisy(GraLoRA(rank=4, blocks=2))
    assert np.linalg.matrix_rank(bench.merged(adapter) - bench.w, tol=1e-4) == 8
    assert sum(t.size for t in adapter.trainable["w"].values()) == 4 * (12 + 8)


def test_refusals(bench):
    with pytest.raises(
        ValueError, match=r"GraLoRA\.rank: got 3, expected a multiple of blocks = 2"
    ):
        GraLoRA(rank=3)
    why = "w: GraLoRA blocks: got 3, expected a divisor of d_out = 8"
    with pytest.raises(ValueError, match=why):
        bench.fresh(GraLoRA(rank=3, blocks=3))


def test_mutation_blocks_on_the_wrong_side_are_seen(bench, monkeypatch):
    good = GraLoRA.parts

    def swapped(self, p):
        a, b = good(self, p)
        return a, b.swapaxes(0, 1)

    monkeypatch.setattr(GraLoRA, "parts", swapped)
    with pytest.raises(AssertionError):
        check_value(bench, GraLoRA(rank=4))

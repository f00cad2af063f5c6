"""GLoRA: its three forms entry by entry."""

import numpy as np
import pytest

from jlora.methods.weight_led.glora import GLoRA


def check_value(bench, form="lora"):
    adapter = bench.noisy(GLoRA(rank=2, form=form))
    p = bench.numbers(adapter)
    if form == "lora":
        a, b = p["a_in"] @ p["a_out"], p["b_in"] @ p["b_out"]
    else:
        a, b = (np.broadcast_to(p[k], (8,))[None] for k in "ab")
    bench.agree(adapter, bench.w + bench.w * a + b)


@pytest.mark.parametrize("form", ["lora", "vector", "constant"])
def test_value(bench, form):
    check_value(bench, form)


def test_limit_a_zero_weight_keeps_the_shift_alone(bench):
    method = GLoRA(rank=2)
    p = bench.noisy(method).trainable["w"]
    want = np.asarray(p["b_in"], np.float64) @ np.asarray(p["b_out"], np.float64)
    np.testing.assert_allclose(method.merge(0 * bench.params["w"], p), want, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"GLoRA\.form: got 'none', expected one of"):
        GLoRA(form="none")
    with pytest.raises(ValueError, match=r"GLoRA\.rank: got 0, expected an integer of at least 1"):
        GLoRA(rank=0)


def test_mutation_the_supports_swapped_are_seen(bench, monkeypatch):
    good = GLoRA.merge

    def swapped(self, w, p):
        return good(self, w, {k: p[k.translate(str.maketrans("ab", "ba"))] for k in p})

    monkeypatch.setattr(GLoRA, "merge", swapped)
    with pytest.raises(AssertionError):
        check_value(bench, "vector")

"""PEANuT: the network layer by layer, and what leads it."""

import numpy as np
import pytest

from jlora.methods.weight_led.peanut import PEANuT


def network(w, p, depth, f):
    h, kept = f(w @ p["a"]), []
    for k in range(depth):
        kept.append(h)
        h = f(h @ p["enc"][k])
    for k in range(depth):
        h = f(h @ p["dec"][k]) + kept[depth - 1 - k]
    return h


def check_value(bench, depth=2):
    adapter = bench.noisy(PEANuT(rank=3, depth=depth, activation="tanh", scaling=0.5))
    p = bench.numbers(adapter)
    bench.agree(adapter, bench.w + 0.5 * network(bench.w, p, depth, np.tanh) @ p["b"], 5e-5)


@pytest.mark.parametrize("depth", [0, 2])
def test_value(bench, depth):
    check_value(bench, depth)


def test_limit_the_weight_zero_stays_zero_under_an_odd_activation(bench):
    method = PEANuT(rank=3, depth=1, activation="tanh")
    p = bench.noisy(method).trainable["w"]
    assert not np.any(method.merge(0 * bench.params["w"], p))
    assert np.any(method.merge(bench.params["w"], p) != bench.params["w"])


def test_refusals():
    with pytest.raises(ValueError, match=r"PEANuT\.depth: got -1, expected an integer"):
        PEANuT(depth=-1)
    with pytest.raises(ValueError, match=r"PEANuT\.activation: got 'mish', expected one of"):
        PEANuT(activation="mish")


def test_mutation_residuals_in_the_other_order_are_seen(bench, monkeypatch):
    good = PEANuT.first

    def turned(self, w, p):
        return good(self, w, p | {"dec": p["dec"][::-1]})

    monkeypatch.setattr(PEANuT, "first", turned)
    with pytest.raises(AssertionError):
        check_value(bench)

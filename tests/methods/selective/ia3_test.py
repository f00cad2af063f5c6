"""IA3 on either side."""

import numpy as np
import pytest

from jlora.methods.selective.ia3 import IA3


def check_value(bench, side):
    adapter = bench.noisy(IA3(side=side))
    diagonal = np.diag(bench.numbers(adapter)["l"])
    bench.agree(adapter, bench.w @ diagonal if side == "out" else diagonal @ bench.w)


@pytest.mark.parametrize("side", ["in", "out"])
def test_value(bench, side):
    check_value(bench, side)


def test_limit_zero_switches_a_feature_off(bench):
    adapter = bench.fresh(IA3())
    off = {"l": adapter.trainable["w"]["l"].at[3].set(0)}
    y = bench.forward(adapter.replace(trainable={"w": off}))
    assert not np.any(y[..., 3]) and np.all(y[..., :3] != 0)


def test_refusals():
    with pytest.raises(ValueError, match=r"IA3\.side: expected 'in' or 'out', got 'both'"):
        IA3(side="both")


def test_mutation_the_other_side_is_seen(bench, monkeypatch):
    monkeypatch.setattr(IA3, "merge", lambda self, w, p: w * (1 + p["l"].mean()))
    with pytest.raises(AssertionError):
        check_value(bench, "out")

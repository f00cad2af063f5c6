"""The claim's units have held-out names alone, and its control pulls tokens together."""

import numpy as np
import pytest

from experiments.claims import dispersive as claim
from experiments.pictures import data
from experiments.pictures.sources import SIDE

RANDOM = np.random.default_rng(0)
N = 24
FOUND = data.Pictures(
    ("google", "mnist"), ("animal", "digit"), ("one", "two"),
    RANDOM.integers(0, 256, (N, SIDE, SIDE, 3), np.uint8),
    np.repeat(np.asarray([1, 2], np.int32), N // 2),
    np.resize(np.asarray([0, 1], np.int32), N), np.full((N, 1), 2, np.int32),
    np.arange(N) % 6 == 0,
)  # fmt: skip
SMALL = claim.Sizes(width=8, depth=1, patch=16, steps=30, batch=8, rate=2e-2)


def test_units_ask_for_held_out_names_and_compare_with_all_real_pictures(monkeypatch):
    monkeypatch.setattr(claim, "LEAST", 6)
    found = claim.units(FOUND, 5)
    assert set(found) == {"google/animal", "mnist/animal"}  # no digit is held out
    for name, (asked, real) in found.items():
        assert len(asked) == 5 and FOUND.held_out[asked].all()
        assert set(asked) <= set(real) and len(real) == 6
        assert (FOUND.style[real] == 1 + (name[0] == "m")).all()
    monkeypatch.setattr(claim, "LEAST", 7)
    assert not claim.units(FOUND, 5)


def test_the_weight_spreads_tokens_and_its_control_pulls_them_together():
    at = claim.World(FOUND, {}, None)
    ranks = {w: claim.trained(SMALL, at, w, 0) for w in (5.0, 0.0, -5.0)}
    assert ranks[5.0][1] > ranks[0.0][1] > ranks[-5.0][1]
    again = claim.trained(SMALL, at, 5.0, 0)
    assert again[1] == ranks[5.0][1]
    with pytest.raises(AssertionError):  # seeds differ in the start and in all that is drawn
        np.testing.assert_array_equal(claim.trained(SMALL, at, 5.0, 1)[1], again[1])

"""MoLA on a decoder: how experts are spread over its layers, and what the control changes."""

import jax
import numpy as np
import pytest

from experiments.claims import decoder_domains as domains
from experiments.claims import decoder_training as lib
from experiments.claims import mola as file


@pytest.fixture
def small(domains, monkeypatch):
    """Two layers with three and one experts more or less, few steps."""
    counts = {"rising": (2, 3), "even": (3, 3), "falling": (3, 2)}
    for name, value in {"COUNTS": counts, "MOST": 3, "RANK": 2, "LORA": 4}.items():
        monkeypatch.setattr(file, name, value)
    monkeypatch.setattr(lib, "STEPS", 60)
    return domains


def test_experts_learn_and_a_shuffled_router_takes_the_wrong_ones(small):
    at = small.test
    adapter = file.trained("rising", 3e-2, 0)
    ours = lib.by_kind(lib.measured(adapter, at), at)
    base = lib.by_kind(domains.measured(None, at)[0], at)
    control = lib.by_kind(lib.measured(file.shuffled(adapter), at), at)
    assert ours.shape == (3,) and ours.mean() < base.mean() - 0.5
    assert control.mean() > ours.mean() + 0.05
    path = sorted(adapter.trainable)[0]
    b = np.asarray(adapter.trainable[path]["b"])  # [layers, experts, r, d_out]
    assert np.abs(b[0, 2]).max() == 0 and np.abs(b[1, 2]).max() > 0  # the first layer has two


def test_the_shuffle_stays_among_the_experts_of_a_layer(small):
    adapter = file.start("rising", 0)
    path = sorted(adapter.trainable)[0]
    before = np.asarray(adapter.trainable[path]["router"])
    after = np.asarray(file.shuffled(adapter).trainable[path]["router"])
    np.testing.assert_array_equal(after[0], before[0][:, [1, 0, 2]])
    np.testing.assert_array_equal(after[1], before[1][:, [2, 0, 1]])


def test_totals_are_equal_and_rates_are_chosen_by_the_lowest_loss():
    assert len({sum(c) for c in file.COUNTS.values()}) == 1
    assert lib.best((1.0, 2.0, 3.0), lambda r: {1.0: 0.2, 2.0: np.nan, 3.0: 0.1}[r]) == 3.0


def test_figures_are_by_kind_of_text(small, monkeypatch):
    monkeypatch.setattr(file, "trained", lambda name, rate, seed: file.start(name, seed))
    monkeypatch.setattr(file, "rate_of", lambda name: 1e-2)
    value = dict(zip(file.COUNTS.values(), (1.0, 2.0, 3.0), strict=True))
    routers = file.start("rising", 0).trainable

    def measured(adapter, at):
        path, method = adapter.sites[0][0].path, adapter.sites[0][1]
        loss = value.get(getattr(method, "counts", None), 4.0)
        if method.__class__.__name__ == "Experts":
            loss += 10 * bool((adapter.trainable[path]["router"] != routers[path]["router"]).any())
        return loss + at.kind[:, 1:]

    monkeypatch.setattr(lib, "measured", measured)
    got = file.run(0, None)
    assert got.units == ("one", "two", "three")
    np.testing.assert_allclose(got[1], (1, 2, 3))
    np.testing.assert_allclose(got[2], (2, 3, 4))
    np.testing.assert_allclose(got[3], (11, 12, 13))  # routers shuffled
    sizes = [got.more[f"{name}: trained numbers"] for name in file.COUNTS]
    rows = sum(x.size for x in jax.tree.leaves(file.start("even", 0).trainable))
    assert sizes[1] == rows and sizes[0] == sizes[2] == int(rows * 5 / 6)

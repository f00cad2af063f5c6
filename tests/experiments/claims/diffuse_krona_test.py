"""Kronecker factors on base D: their size, their form, and what is compared."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import jlora as jl
from experiments.claims import diffuse_krona as file
from experiments.pictures import base_d
from experiments.styles.pictures import tiny_base
from experiments.styles.zoo_training import fresh
from jlora.models import dit


def test_factors_are_whole_and_35_percent_smaller():
    kept = json.loads((base_d.FOLDER / "config.json").read_text(encoding="utf-8"))
    config = dit.DiTConfig(**{k: v for k, v in kept.items() if k != "model_type"})
    base = SimpleNamespace(config=config, names={"longest_name": 3})
    world: Any = SimpleNamespace(base=base)
    size = {name: file.numbers(world, name) for name in file.METHODS}
    assert size["DiffuseKronA"] == pytest.approx(0.65 * size["LoRA"])
    method: Any = file.METHODS["DiffuseKronA"]
    adapter = fresh(config, 3, file.SITES, method, 0)
    assert len(adapter.sites) == 4
    for path, arrays in adapter.trainable.items():
        assert sorted(arrays) == ["w1", "w2"]  # neither is factored
        assert np.asarray(adapter.frozen[path]["scale"]).max() == 1


def test_training_moves_both_factors_of_every_kernel(monkeypatch):
    base = tiny_base()
    method: Any = jl.LoKr(rank=32, alpha=32.0, sizes=(2, 4))
    monkeypatch.setitem(file.METHODS, "DiffuseKronA", method)
    rows, names = 6, base.names
    pictures = SimpleNamespace(
        styles=("google",), style=np.ones(rows, np.int32), held_out=np.zeros(rows, bool),
        words=np.ones((rows, names["longest_name"]), np.int32),
        pixels=np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), np.uint8),
    )  # fmt: skip
    world: Any = SimpleNamespace(base=base, pictures=pictures)
    sizes = file.Sizes(steps=3, batch=2)
    after = file.trained(world, "DiffuseKronA", ("google", "invert", 1.0), 1e-2, sizes, 0)
    before = fresh(base.config, names["longest_name"], file.SITES, method, 0)
    for path, arrays in before.trainable.items():
        for name, value in arrays.items():
            assert np.abs(np.asarray(after.trainable[path][name] - value)).max() > 1e-4


def test_figures_are_means_over_rates_above_the_lowest(monkeypatch):
    monkeypatch.setattr(file.styles, "asked", lambda world, *style_and_each: SimpleNamespace(
        name=style_and_each[1]))  # fmt: skip
    monkeypatch.setattr(file, "numbers", lambda world, name: 7)
    monkeypatch.setattr(file, "trained", lambda world, name, style, rate, sizes, seed: (
        name, style[1], rate))  # fmt: skip

    def distance(world, adapter, one, sizes, seed):
        if adapter is None:
            return 50.0
        name, style, rate = adapter
        return rate * (1 if name == "DiffuseKronA" else 2) + 100 * (style != one.name)

    monkeypatch.setattr(file, "distance", distance)
    world: Any = None
    got = file.figures(0, world, {name: [1.0, 2, 3, 4, 10] for name in file.METHODS})
    assert got.units == tuple(family for _, family, _ in file.STYLES)
    np.testing.assert_allclose(got[1:4], [[3, 3], [6, 6], [103, 103]])
    assert got.more["LoRA, invert: range"] == 18 and got.more["base D, ground"] == 50


def test_the_middle_rate_is_the_best_over_styles(monkeypatch):
    monkeypatch.setattr(file, "trained", lambda world, name, style, rate, sizes, seed: rate)
    score = dict(zip(file.GRID, (5.0, 4.0, np.nan, 3.0, 6.0, 7.0), strict=True))
    monkeypatch.setattr(file, "distance", lambda world, rate, one, sizes, seed: score[rate])
    world: Any = None
    targets: Any = ["a", "b"]
    assert file.middle(world, "LoRA", targets, file.SIZES) == file.GRID[3]

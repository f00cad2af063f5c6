"""Sequences that turn from one kind of text to another: their rows, their gates, their figures."""

import jax
import numpy as np
import pytest

from experiments.claims import decoder_domains as lib
from experiments.claims import meteora_sequence as file


def test_rows_are_pieces_of_different_kinds(domains):
    rows = domains.test
    size = lib.SEGMENT * lib.SEGMENTS + 1
    assert rows.ids.shape == rows.kind.shape == (12, size)
    np.testing.assert_array_equal(rows.ids // 8, rows.kind)  # eight tokens of each kind
    step = (2 * rows.kind + 1)[:, 1:]
    moved = (rows.ids[:, 1:] - rows.ids[:, :-1] - step) % 8
    turn = np.arange(1, size) == lib.SEGMENT
    assert (moved[:, ~turn] == 0).all() and (rows.kind[:, 0] != rows.kind[:, -1]).all()


def test_gates_change_adapters_in_a_row_and_turned_gates_take_the_wrong_ones(domains, monkeypatch):
    monkeypatch.setattr(file, "STEPS", 60)
    monkeypatch.setattr(file, "RATE", 5e-2)
    monkeypatch.setattr(file, "TOP", 1)
    got = file.run(0, None)
    assert len(got.units) == 12
    ours, single, control = (np.mean(x) for x in got[1:4])
    assert ours < single - 0.3 and control > single
    assert got.more["share of the own adapters' gain, all tokens"] > 0.4
    assert got.more["own adapters: perplexity"] < 0.5 * got.more["base L: perplexity"]
    assert any(name.startswith("best single: ") for name in got.more)
    assert got.more["gates turned: perplexity"] == pytest.approx(np.exp(control))


def test_gates_are_trained_and_adapters_are_not(domains, monkeypatch):
    monkeypatch.setattr(file, "STEPS", 1)
    monkeypatch.setattr(lib, "STEPS", 1)
    adapters = [lib.own(d, 0) for d in range(3)]
    made = file.gated(adapters, 0)
    path = sorted(made.trainable)[0]
    assert set(made.trainable[path]) == {"gate"}
    for n, adapter in enumerate(adapters):
        np.testing.assert_array_equal(made.frozen[path]["b"][:, n], adapter.trainable[path]["b"])
    turned = file.turned(made)
    want = np.roll(np.asarray(made.trainable[path]["gate"]), 1, -1)
    np.testing.assert_array_equal(turned.trainable[path]["gate"], want)
    equal = jax.tree.map(lambda x, y: bool((x == y).all()), turned.frozen, made.frozen)
    assert all(jax.tree.leaves(equal))


def test_shares_and_picked_values_by_hand(monkeypatch):
    monkeypatch.setattr(lib, "SEGMENT", 6)
    base, own = np.full((2, 12), 3.0), np.full((2, 12), 1.0)
    ours = np.full((2, 12), 1.5)
    ours[:, 6 : 6 + file.NEAR] = 2.5
    got = file.gains(ours, own, base)
    assert got[f"share of the own adapters' gain, {file.NEAR} tokens after a turn"] == 0.25
    assert got["share of the own adapters' gain, later tokens"] == 0.75
    each = np.stack([np.zeros((1, 3)), np.ones((1, 3))])
    assert file.picked(each, np.asarray([[1, 0, 1]])).tolist() == [[1, 0, 1]]

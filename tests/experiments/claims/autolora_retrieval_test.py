"""Retrieval of adapters by text: cosines, the neighbours' scores, an encoder of unseen tasks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import autolora_retrieval as file
from experiments.claims import retrieval_zoo as lib

UNUSED = Path("unused")
SEEN, UNSEEN, E, R = 48, 10, 4, 4


def model(p, x):
    return x @ p["w"]


@pytest.fixture(scope="module")
def found():
    """Tasks whose delta is U diag(text) V, each adapter with noise and in a basis of its own."""
    rng = np.random.default_rng(0)
    count = SEEN + UNSEEN
    texts = rng.normal(size=(count, E))
    u, v = rng.normal(size=(6, E)), rng.normal(size=(E, 5))
    a, b = [], []
    for c in np.repeat(texts, lib.SEEDS, axis=0):
        turn = 2 * np.linalg.qr(rng.normal(size=(R, R)))[0]
        a.append((u * c + 0.05 * rng.normal(size=u.shape)) @ turn)
        b.append(np.linalg.inv(turn) @ v)
    trainable = {"w": {"a": np.stack(a).astype("f4"), "b": np.stack(b).astype("f4")}}
    like = jl.init(jax.random.key(0), model, {"w": jnp.zeros((6, 5))}, jnp.ones((1, 6)),
                   methods={"w": jl.LoRA(R, alpha=float(R))})  # fmt: skip
    levels = ("seen",) * SEEN + ("unseen_pair",) * UNSEEN
    names = tuple(f"t{n}" for n in range(count))
    return lib.banked(names, levels, texts.astype("f4"), like, trainable, 0.5)


def flat(found):
    low = found.deltas["w"]
    return np.asarray(low.u @ low.v, "f8").reshape(-1, 30)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_cosines_by_numpy(found):
    rows = unit(flat(found))
    np.testing.assert_allclose(lib.similar(found, "deltas", np.arange(2)), rows @ rows.T, atol=1e-3)
    known = lib.positions(found.seen, (0, 2))
    np.testing.assert_array_equal(known[1], [3, 5])
    moved = unit(rows - rows[known.reshape(-1)].mean(0))
    got = lib.similar(found, "centred deltas", known)
    np.testing.assert_allclose(got, moved @ moved.T, atol=1e-3)
    gauge = found.cosines["factors"]  # another basis is another file
    assert np.abs(gauge - found.cosines["deltas"]).max() > 0.2


def test_neighbours_by_numpy(found):
    known, queries, at = found.seen, found.held_out, lib.positions(found.held_out, (1,))[:, 0]
    got = lib.by_neighbours(found, "deltas", 2, known, (0, 2), queries, at)
    rows = unit(flat(found)).reshape(-1, lib.SEEDS, 30)
    texts = unit(found.texts - found.texts[known].mean(0))
    for n, q in enumerate(queries):
        near = texts[known] @ texts[q]
        two = np.argsort(-near)[:2]
        w = np.exp(near[two] / 0.1)
        want = sum(
            x / w.sum() * (rows[known[t]][[0, 2]] @ rows[queries, 1].T).mean(0)
            for x, t in zip(w, two, strict=True)
        )
        np.testing.assert_allclose(got[n], want, atol=1e-4)
    assert lib.recall(np.eye(4)[[0, 1, 3, 2]]).tolist() == [1, 1, 0, 0]


def test_an_encoder_finds_unseen_tasks_and_none_without_their_texts(found, monkeypatch):
    monkeypatch.setattr(file, "STEPS", (200,))
    monkeypatch.setattr(file, "RATE", 1e-2)
    monkeypatch.setattr(lib, "bank", lambda config, workdir: found)
    monkeypatch.setattr(file, "chosen", lambda config, workdir: (200, "deltas", 2))
    plain, seen = file.fitted, []

    def fitted(bank, known, texts, seeds, seed, steps):
        seen.append((set(known.tolist()), seeds))
        return plain(bank, known, texts, seeds, seed, steps)

    monkeypatch.setattr(file, "fitted", fitted)
    got = file.figures(lib.CONFIG, 1, UNUSED)
    assert got.units == found.names[SEEN:]
    assert np.mean(got.system) >= 0.7 > 0.4 > np.mean(got.control)
    assert got.more["held-out seeds: encoder: recall at 1"] >= 0.8
    assert got.more["held-out tasks: chance"] == pytest.approx(1 / UNSEEN)
    assert got.more["neighbours by deltas"] == 1.0 and got.more["steps"] == 200
    assert seen == [(set(range(SEEN)), (0, 2))] * 2  # adapter 1 is not trained on


def test_steps_and_neighbours_are_chosen_on_some_seen_tasks(found, monkeypatch):
    few, asked = set(found.seen[:: file.EVERY].tolist()), []

    def fitted(bank, known, texts, seeds, seed, steps):
        assert set(known.tolist()) == set(range(SEEN)) - few and texts.shape == (len(known), E)
        return list(file.STEPS)

    def scores(good, queries, at):
        asked.append(set(queries.tolist()))
        return np.eye(len(at)) if good else 1 - np.eye(len(at))

    def encoder(bank, params, known, queries, at):
        return scores(params == 100, queries, at)

    def neighbours(bank, kind, k, known, seeds, queries, at):
        return scores((kind, k) == ("centred deltas", 4), queries, at)

    monkeypatch.setattr(lib, "bank", lambda config, workdir: found)
    monkeypatch.setattr(file, "fitted", fitted)
    monkeypatch.setattr(file, "by_encoder", encoder)
    monkeypatch.setattr(lib, "by_neighbours", neighbours)
    assert file.chosen.__wrapped__(lib.CONFIG, UNUSED) == (100, "centred deltas", 4)
    assert all(each == few for each in asked)


def test_texts_of_the_control_are_all_of_another_task():
    texts = np.arange(12.0).reshape(6, 2)
    moved = file.elsewhere(texts, np.random.default_rng(0).permutation(6))
    assert (moved != texts).all() and set(moved[:, 0]) == set(texts[:, 0])

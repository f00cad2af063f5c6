"""Lanes are trained by their own gradient and rate; the best rate is an inner one of its grid."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.claims import text_methods as lib
from experiments.claims.protocol import Figures, verdict
from tests.experiments.claims.federated_rounds_test import D, linear

NAMES = ("query", "key", "value", "out")
PLAIN = lib.on_attention("LoRA", jl.LoRA(rank=2, alpha=2.0), 1.0, solver=optax.sgd, steps=1)


@pytest.fixture
def found():
    """Two tasks on a linear model; every training row of a task is the same text."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    base = {"layers": {"attention": {s: {"kernel": 0.1 * f32(1, D, D)} for s in NAMES}}}
    index = jnp.arange(2, dtype=jnp.int32)[:, None] * jnp.ones((1, 5), jnp.int32)
    label = jnp.asarray([[0] * 5, [1] * 5], jnp.int32)
    rows = (jnp.repeat(index[:, :1], 2 * lib.ROWS, axis=1),
            jnp.tile(jnp.asarray([0, 1], jnp.int32), (2, lib.ROWS)))  # fmt: skip
    return lib.Tasks(linear, base, ("a", "b"), index, label, f32(2, 2, D), f32(2, 2, D),
                     jnp.ones((2, 2), bool), rows, rows)  # fmt: skip


def test_a_lane_steps_by_its_own_gradient_and_rate(found):
    adapter = lib.fresh(found, PLAIN, 0)
    rates, at = np.asarray([1.0, 1.0, 0.25]), np.asarray([0, 1, 1])
    made = lib.train(found, PLAIN, adapter, rates, at, 0)
    held = found.base["layers"]["attention"]
    total = np.sum([np.asarray(held[s]["kernel"][0], "f8") for s in NAMES], axis=0)
    for n, (rate, t) in enumerate(zip(rates, at, strict=True)):
        x = np.asarray(found.hidden[t], "f8").sum(0)
        head = np.asarray(found.heads[t], "f8")
        z = head @ (total.T @ x)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        assert made.loss[n] == pytest.approx(-np.log(p[t]), rel=1e-4)
        out = head.T @ (p - np.eye(2)[t])  # dL / d(output); the label of task t is t
        for path in lib.SITES:
            a = np.asarray(adapter.trainable[path]["a"][0], "f8")
            moved = np.asarray(made.trainable[path]["b"][n, 0])
            np.testing.assert_allclose(moved, -rate * np.outer(a.T @ x, out), rtol=1e-4, atol=1e-5)
    every = {p: {k: v[:2] for k, v in d.items()} for p, d in made.trainable.items()}
    right = lib.judge(found, adapter.replace(trainable=every), found.test, at[:2])
    for t in range(2):
        w = total + np.sum([adapter.trainable[p]["a"][0] @ every[p]["b"][t, 0] for p in lib.SITES],
                           axis=0)  # fmt: skip
        logits = np.asarray(found.heads[t], "f8") @ (w.T @ np.asarray(found.hidden[t], "f8").sum(0))
        assert (right[t] == (logits.argmax() == np.tile([0, 1], lib.ROWS))).all()


@pytest.mark.parametrize(
    ("top", "tried", "edge"), [(1.5, 3, False), (9.0, 5, False), (0.2, 4, False), (1e4, 7, True)]
)
def test_the_grid_grows_where_its_best_rate_is_at_an_end(found, monkeypatch, top, tried, edge):
    """Validation accuracy falls with the distance of the rate from `top`, in logarithms."""

    def train(found, recipe, adapter, rates, at, seed):
        assert seed == lib.TUNING
        return lib.Lanes({"x": jnp.asarray(rates)}, np.log(np.asarray(rates) / top) ** 2)

    def judge(found, adapter, rows, at):
        assert rows is found.validation
        return np.exp(-(np.log(np.asarray(adapter.trainable["x"]) / top) ** 2))[:, None]

    monkeypatch.setattr(lib, "train", train)
    monkeypatch.setattr(lib, "judge", judge)
    monkeypatch.setattr(lib, "tasks", lambda workdir: found)
    for metric in ("accuracy", "loss"):
        best = lib.tune(dataclasses.replace(PLAIN, rate=1.0), Path("unused"), metric)
        assert (len(best.curve), best.edge) == (tried, edge)
        assert best.rate == max(best.curve, key=best.curve.__getitem__)


def test_shuffled_labels_train_another_task(found):
    mixed = found._replace(label=jnp.asarray([[0, 1] * 20, [1, 0] * 20], jnp.int32),
                           index=jnp.zeros((2, 40), jnp.int32))  # fmt: skip
    adapter, at = lib.fresh(mixed, PLAIN, 0), np.arange(2)
    lost = dataclasses.replace(PLAIN, shuffled=True)
    a, b = (lib.train(mixed, r, adapter, np.ones(2), at, 0).trainable for r in (PLAIN, lost))
    assert not np.allclose(a[lib.SITES[0]]["b"], b[lib.SITES[0]]["b"])


@pytest.mark.parametrize(("metric", "margin", "words"), [
    ("accuracy", -0.01, "> LoRA of rank 3 - 1 points"), ("accuracy", 0.02, "+ 2 points"),
    ("loss", -0.1, "< LoRA of rank 3 + 0.1"), ("loss", 0.0, "< LoRA of rank 3"),
])  # fmt: skip
def test_the_statement_says_what_the_verdict_is_given_on(metric, margin, words):
    claim = lib.claim("x", ("LoRA",), PLAIN, lib.lora(3), "nobody", metric=metric, margin=margin)
    assert claim.statement.endswith(words)
    step = -1.0 if metric == "loss" else 1.0
    level = step * (margin + 0.001) + 0.5
    figures = Figures(("a", "b"), (level,) * 2, (0.5,) * 2, (0.5 - step,) * 2)
    assert verdict(claim, [figures] * 3).verdict == "reproduced"
    figures = figures._replace(system=(level - step * 0.002,) * 2)
    assert verdict(claim, [figures] * 3).verdict == "other way round"

"""The control of merging claims keeps the singular values and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import text_merges


def test_random_directions_keep_spectra_and_lose_the_directions():
    params, rng = {"w": jnp.ones((12, 9))}, np.random.default_rng(0)
    fresh = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, jnp.ones((2, 12)),
                    methods={"w": jl.LoRA(rank=3, alpha=6.0)})  # fmt: skip
    a, b = rng.normal(size=(12, 3)), rng.normal(size=(3, 9))
    arrays = {"w": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}
    adapter = fresh.replace(trainable=arrays)
    adapters = {("t", seed, 3): adapter for seed in (0, 1)}
    shared = text_merges.cells.Bench((), None, None, adapters, adapter, {}, {})
    lost = text_merges.random_directions(shared, 1)
    one = lost["t", 1, 3]
    dense = np.asarray(one.trainable["w"]["a"], "f8") @ np.asarray(one.trainable["w"]["b"], "f8")
    dense = dense * float(one.frozen["w"]["scale"])
    expected = np.linalg.svd(2.0 * a @ b, compute_uv=False)[:3]
    np.testing.assert_allclose(np.linalg.svd(dense, compute_uv=False)[:3], expected, rtol=1e-4)
    cosine = np.sum(dense * (a @ b)) / np.linalg.norm(dense) / np.linalg.norm(a @ b)
    assert abs(cosine) < 0.5


TASKS = tuple(f"t{i}" for i in range(8))


def test_what_is_merged_covers_every_task_once():
    plan: list[tuple[text_merges.Kind, int, int]]
    plan = [("tasks", 1, 8), ("pairs", 4, 2), ("copies", 8, 2)]
    for kind, merges, size in plan:
        found = text_merges.groups(kind, TASKS, 2)
        assert len(found) == merges
        assert [len(parts) for parts, _ in found] == [size] * merges
        assert sorted(t for _, judged in found for t in judged) == sorted(TASKS)
    assert text_merges.groups("copies", TASKS, 2)[0] == ((("t0", 2), ("t0", 0)), ("t0",))


@pytest.fixture
def toy(monkeypatch):
    """Two seeds of eight tasks on a linear model; adapter i moves logit i % 2 for input i."""
    params = {"w": jnp.zeros((8, 2))}
    fresh = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, jnp.ones((2, 8)),
                    methods={"w": jl.LoRA(rank=1, alpha=1.0)})  # fmt: skip
    adapters, test, few = {}, {}, {}
    for i, task in enumerate(TASKS):
        for seed in range(3):
            a = jnp.zeros((8, 1)).at[i].set(1.0 + seed)
            b = jnp.zeros((1, 2)).at[0, i % 2].set(1.0)
            adapters[task, seed, 4] = fresh.replace(trainable={"w": {"a": a, "b": b}})
        x = np.tile(np.eye(8)[i], (6, 1))
        label = jnp.full(6, i % 2, jnp.int32)
        test[task] = few[task] = text_merges.cells.Rows(
            (jnp.asarray(x, jnp.float32),), label.at[0].set(1 - i % 2), 5
        )
    bench = text_merges.cells.Bench(TASKS, linear, params, adapters, fresh, test, few)
    monkeypatch.setattr(text_merges, "bench", lambda workdir: bench)
    for cached in (text_merges.cell, text_merges._random, text_merges._joined):
        monkeypatch.setattr(text_merges, cached.__wrapped__.__name__, cached.__wrapped__)


def linear(params, x):
    return x @ params["w"]


@pytest.mark.parametrize("kind", ["tasks", "pairs", "copies"])
def test_a_merge_of_tasks_that_do_not_meet_is_right_everywhere(toy, tmp_path, kind):
    side = text_merges.Side("task_arithmetic")
    found = text_merges.cell(side, kind, 0, tmp_path)
    # one of the five rows that are not padding has the other label
    assert found.accuracy == pytest.approx(dict.fromkeys(TASKS, 0.8))
    assert found.factor == 1.0  # of equally good factors the least
    lost = text_merges.control(side, kind, 0, tmp_path)
    assert np.mean(list(lost.accuracy.values())) < 0.7


def test_figures_are_of_system_baseline_and_control(toy, tmp_path):
    claim = text_merges.claim("x", (), "ties", "-", options={"density": 1.0}, margin=-0.01,
                              baseline=text_merges.SINGLE, kind="pairs")  # fmt: skip
    assert claim.statement.endswith("ties > single adapter - 1 points")
    found = claim.run(0, tmp_path)
    assert found.units == TASKS and found.system == pytest.approx([0.8] * 8)
    # the adapter of the first task of a pair says nothing of the second: logits 0, class 0
    assert found.baseline == pytest.approx([0.8, 0.2] * 4)

"""The control of merging claims keeps the singular values and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import text_merges
from tests.experiments.claims.conftest import TASKS


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


def test_what_is_merged_covers_every_task_once():
    plan: list[tuple[text_merges.Kind, int, int]]
    plan = [("tasks", 1, 8), ("pairs", 4, 2), ("copies", 8, 2)]
    for kind, merges, size in plan:
        found = text_merges.groups(kind, TASKS, 2)
        assert len(found) == merges
        assert [len(parts) for parts, _ in found] == [size] * merges
        assert sorted(t for _, judged in found for t in judged) == sorted(TASKS)
    assert text_merges.groups("copies", TASKS, 2)[0] == ((("t0", 2), ("t0", 0)), ("t0",))


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

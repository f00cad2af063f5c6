"""Learned merges: the task itself is left out, its few labels are seen, and exchanged."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import learned_merges, text_merges
from tests.experiments.claims.conftest import TASKS


def memory(loss, adapters, batch, key):
    """An adapter that answers the mean label of the batch for its inputs."""
    assert len(adapters) == len(TASKS) - 1
    inputs, label = batch
    p = label.mean()
    one = adapters[0]
    a, b = inputs.mean(axis=0)[:, None], jnp.stack([1 - p, p])[None]
    return one.replace(trainable={"w": {"a": a, "b": b}})


def test_few_rows_of_a_new_task_are_what_is_learned_from(toy, tmp_path):
    found = learned_merges.few_shot(memory, 0, tmp_path)
    assert found.units == TASKS
    assert found.system == pytest.approx([0.8] * 8)  # one row in five has the other label
    assert found.control == pytest.approx([0.2] * 8)
    # adapters of other tasks say nothing of this one: logits 0, class 0
    assert found.baseline == pytest.approx([0.8, 0.2] * 4)


def test_merges_without_labels_are_judged_on_all_tasks(toy, tmp_path, monkeypatch):
    seen = []

    def merged(bench, setting, method, plan):
        seen.append((bench.adapters, setting.tasks, method))
        return text_merges.merged(text_merges.Side("task_arithmetic"), [
            bench.adapters[t, setting.seed, r]
            for t, r in zip(setting.tasks, setting.ranks, strict=True)], 0)  # fmt: skip

    monkeypatch.setattr(learned_merges.cells, "merged", merged)
    found = learned_merges.unlabelled("adamerging", 1, tmp_path)
    assert found.units == TASKS and found.system == pytest.approx([0.8] * 8)
    assert np.mean(found.control) < 0.7
    real, lost = seen
    assert real[1:] == lost[1:] == (TASKS, "adamerging") and real[0] is not lost[0]

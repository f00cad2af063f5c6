"""Pictures as a bench: which rows are in which split, and what a step is given."""

import numpy as np
import pytest

from experiments.claims import clip_training as clip
from experiments.variant_study import vision


def task(train, test):
    rows = [clip.Rows(np.full((n, 1), 7, np.uint8), np.arange(n, dtype=np.int32) + 1000 * k)
            for k, n in enumerate((train, test))]  # fmt: skip
    return clip.Task("own", clip.Head(np.zeros((2, 3)), np.zeros(2)), *rows)


@pytest.mark.parametrize("train", [40, 900])
def test_splits_share_no_picture_and_test_rows_are_those_held_out(train):
    rows = vision.splits(task(train, 30))
    parts = {split: set(own.label.tolist()) for split, own in rows.items()}
    assert parts["test"] == {1000 + n for n in range(30)}
    assert not parts["train"] & parts["validation"]
    want = {40: (30, 10), 900: (vision.ROWS["train"], vision.ROWS["validation"])}[train]
    assert (len(parts["train"]), len(parts["validation"])) == want


def test_a_step_is_given_pictures_of_its_task_and_its_head():
    bench = vision.base_c(None, None, toy=True)  # type: ignore[arg-type]
    assert bench.names == ("first", "second") and bench.sizes["train"] == 20
    rows = np.asarray([3, 19], np.int32)
    (pictures, head), label = bench.pick(bench.data, "train", np.int32(1), rows)
    pixels, labels = (np.asarray(x) for x in bench.data["rows"]["train"])
    np.testing.assert_allclose(pictures, pixels[1][rows] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(label, labels[1][rows])
    np.testing.assert_array_equal(head.vectors, bench.data["heads"].vectors[1])
    logits = np.asarray(bench.apply(bench.base, pictures, head))
    assert logits.shape == (2, 3) and np.isfinite(logits).all()
    other = bench.pick(bench.data, "train", np.int32(0), rows)[0][1]
    assert np.abs(np.asarray(bench.apply(bench.base, pictures, other)) - logits).max() > 1e-3


def test_tasks_with_fewer_rows_repeat_theirs():
    draws = [clip.Rows(np.arange(n, dtype=np.uint8)[:, None], np.arange(n, dtype=np.int32))
             for n in (3, 5)]  # fmt: skip
    heads = clip.Head(np.zeros((2, 4, 3)), np.zeros((2, 4)))
    bench = vision.of_pictures(None, {}, {"train": draws}, heads, ("a", "b"), "k")
    np.testing.assert_array_equal(bench.data["rows"]["train"][1][0], [0, 1, 2, 0, 1])
    assert bench.sizes == {"train": 5}

"""Every way sees as many pictures; moved and mirrored ones are still those of their label."""

import numpy as np

from experiments.claims import clip_training as clip
from experiments.claims import datadream as lib


def test_batches_follow_from_the_seed_and_keep_their_labels():
    """Picture k is white with a square of brightness k, off the middle."""
    pixels = np.full((6, 32, 32, 3), 255, np.uint8)
    for k in range(6):
        pixels[k, 10:20, 6:16] = 10 * k
    rows = clip.Rows(pixels, np.arange(6, dtype=np.int32))
    plain, label = lib.batches(rows, 3, 5, False)
    np.testing.assert_array_equal(plain, pixels[label])
    assert plain.shape == (3, clip.BATCH, 32, 32, 3)
    changed, same = lib.batches(rows, 3, 5, True)
    np.testing.assert_array_equal(same, label)
    np.testing.assert_array_equal(changed.min((2, 3, 4)), 10 * label)
    np.testing.assert_array_equal((changed < 255).sum((2, 3, 4)), 300)  # nothing is cut off
    columns = (changed < 255).any((2, 4))
    middle = (columns * np.arange(32)).sum(-1) / columns.sum(-1)
    left, right = middle < 15, middle > 16
    assert (left | right).all() and 0.2 < right.mean() < 0.8  # about half are mirrored
    assert len(np.unique(middle)) > 4  # and they are moved
    again, _ = lib.batches(rows, 3, 5, True)
    np.testing.assert_array_equal(again, changed)
    other, _ = lib.batches(rows, 3, 6, True)
    assert (other != changed).any()

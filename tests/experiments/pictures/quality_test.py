"""The card's figures by other means: distances, accuracies, choices."""

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

from experiments.pictures import data, quality, sampling

RANDOM = np.random.default_rng(0)


def test_frechet_by_scipy():
    a, b = RANDOM.normal(size=(40, 5)), 2 * RANDOM.normal(size=(50, 5)) @ RANDOM.normal(size=(5, 5))
    one, two = np.cov(a.T), np.cov(b.T)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert quality.frechet(a, b) == pytest.approx(want, rel=1e-6)
    assert quality.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert quality.frechet(a, a + 3) == pytest.approx(5 * 9)
    with pytest.raises(ValueError, match="got 1 and 50 rows"):
        quality.frechet(a[:1], b)


def test_nearest_by_all_pairs(monkeypatch):
    monkeypatch.setattr(quality, "BLOCK", 4)
    x, bank = (RANDOM.integers(0, 256, (n, 3, 3, 3), np.uint8) for n in (5, 11))
    x[0] = bank[10]
    pairs = x.astype(np.float64)[:, None] - bank.astype(np.float64)[None]
    want = np.sqrt((pairs**2).mean((2, 3, 4)).min(1))
    np.testing.assert_allclose(quality.nearest(x, bank), want, atol=0.1)
    copies = quality.near(bank[:5], x[1:], bank)
    assert copies["samples nearer than 95 % of the held-out pictures"] == 1.0
    assert quality.near(x[1:], x[1:], bank)["samples nearer than 95 % of the held-out pictures"] < 1


def found(count=60):
    """Pictures of two styles, a third of them of the second."""
    style = np.where(np.arange(count) % 3 == 0, 2, 1).astype(np.int32)
    return data.Pictures(
        ("a", "b"), ("x", "y"), ("one",), np.zeros((count, 32, 32, 3), np.uint8), style,
        np.arange(count, dtype=np.int32) % 2, np.ones((count, 2), np.int32),
        np.arange(count) % 5 == 0,
    )  # fmt: skip


def test_choices_are_balanced_and_not_repeated():
    pictures = found()
    chosen = quality.balanced(pictures, pictures.train, 20, 0)
    assert len(set(chosen)) == len(chosen) == 20 and not pictures.held_out[chosen].any()
    assert (pictures.style[chosen] == 2).sum() == 10
    assert list(chosen) != list(quality.balanced(pictures, pictures.train, 20, 1))


def test_accuracies_by_style():
    pictures, rows = found(), np.arange(6)
    label = pictures.label[rows].copy()
    label[0] = 1 - label[0]  # of style b
    got = quality.accuracies(pictures, rows, pictures.style[rows], label)
    assert got["style"] == 1.0 and got["label"] == pytest.approx(5 / 6, abs=1e-4)
    assert got["a"]["label"] == 1.0 and got["b"]["label"] == 0.5 and got["pictures"] == 6


def test_a_sheet_is_a_png_of_rows(tmp_path):
    rows = [RANDOM.integers(0, 255, (n, 32, 32, 3), np.uint8) for n in (2, 1)]
    sampling.sheet(rows, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        whole = np.asarray(picture)
    assert whole.shape == (128, 128, 3)
    np.testing.assert_array_equal(whole[:64:2, 64::2], rows[0][1])
    np.testing.assert_array_equal(whole[64::2, :64:2], rows[1][0])
    assert (whole[64:, 64:] == 255).all()

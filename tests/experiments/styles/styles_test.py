"""Styles: transforms against their definitions, held-out values that are what they are called."""

import colorsys

import numpy as np
import pytest

from experiments.pictures import sources
from experiments.styles import catalogue, pictures, transforms

X = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
BYTES = np.round(X * 255).astype(np.uint8)
BYTES[:, :12] = 255  # ground


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_colours_turn_as_the_standard_library_says():
    y, i, q = colorsys.rgb_to_yiq(*X[0, 3, 4].astype(float))
    angle = np.deg2rad(70)
    turned = (y, np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q)
    # colorsys has YIQ coefficients of two digits
    got = transforms.hue(X, 70.0)[0, 3, 4]
    r, g, b = (turned[0] + c for c in np.linalg.solve(_chroma(), turned[1:]) @ _back())
    np.testing.assert_allclose(got, (r, g, b), atol=0.03)
    close(transforms.hue(X, 0.0), X)
    close(transforms.hue(transforms.hue(X, 100.0), 260.0), X)
    close(transforms.luma(transforms.hue(X, 33.0)), transforms.luma(X))


def _chroma():
    return np.asarray([colorsys.rgb_to_yiq(1, 0, 0)[1:], colorsys.rgb_to_yiq(0, 0, 1)[1:]]).T


def _back():
    """What the two colours that `_chroma` has look like without their luma."""
    rows = np.asarray([(1.0, 0, 0), (0, 0, 1.0)])
    return rows - [[colorsys.rgb_to_yiq(*row)[0]] for row in rows]


def test_values_by_their_definition():
    grey = (0.299 * X[..., 0] + 0.587 * X[..., 1] + 0.114 * X[..., 2])[..., None]
    close(transforms.invert(X, 1.0), 1 - X)
    close(transforms.saturation(X, 0.0), np.repeat(grey, 3, -1))
    close(transforms.saturation(X, 1.0), X)
    close(transforms.gamma(X, 2.0), X * X)
    close(transforms.posterise(X, 2.0), X > 0.5)
    red = transforms.colour(0.0)
    close(red, (1.0, 0.4375, 0.4375))
    close(transforms.tint(X, 0.0), 0.75 * grey * red + 0.25 * X)
    white = transforms.ground(np.concatenate([np.ones_like(X[:1]), 0.7 * X[:1]]), 0.0)
    close(white[0], np.broadcast_to(red, X[0].shape))
    close(white[1], 0.7 * X[0])


def test_maps_of_places():
    blocks = X.reshape(2, 8, 4, 8, 4, 3).mean((2, 4))
    close(transforms.pixelate(X, 8.0), blocks.repeat(4, 1).repeat(4, 2))
    assert len(np.unique(transforms.pixelate(X, 11.0)[0, :, 0, 0])) == 11
    from PIL import Image, ImageFilter

    for value in (0.7, 2.0):
        dot = np.zeros((1, 32, 32, 3), np.float32)
        dot[:, 16, 16] = 1.0
        got = transforms.blur(dot, value)[0, ..., 0]
        there = np.sqrt(((np.arange(32) - 16) ** 2 * got.sum(0)).sum())
        np.testing.assert_allclose((got.sum(), there), (1.0, value), rtol=0.05)
    smooth = Image.fromarray(BYTES[0]).filter(ImageFilter.GaussianBlur(2.0))
    mine = transforms.transformed(BYTES[:1], "blur", 2.0)[0].astype(int)
    assert np.abs(mine[6:-6, 6:-6] - np.asarray(smooth)[6:-6, 6:-6]).mean() < 2
    step = np.zeros((1, 32, 32, 3), np.float32)
    step[:, :, 16:] = 0.5
    drawn = transforms.lines(step, 1.5)[0, 5, :, 0]
    close(drawn[14:18], (1.0, 0.25, 0.25, 1.0))
    dots = [transforms.halftone(np.full_like(X, v), 4.0).mean() for v in (0.2, 0.5, 0.8)]
    assert dots == sorted(dots) and dots[1] == pytest.approx(0.5, abs=0.02)
    rows = transforms.stripes(np.ones_like(X), 4.0)[0, :, 0, 0]
    close(rows[:4], 0.35 + 0.65 * (0.5 + 0.5 * np.cos(np.pi / 2 * (np.arange(4) + 0.5))))


@pytest.mark.parametrize("family", transforms.FAMILIES)
def test_every_family_is_a_function_of_picture_and_value(family):
    hues = dict.fromkeys(("hue", "tint", "ground"), 200.0)
    value = (hues | {"pixelate": 9.0, "posterise": 3.0, "halftone": 3.5}).get(family, 1.7)
    both = transforms.transformed(BYTES, family, value)
    np.testing.assert_array_equal(transforms.transformed(BYTES[1:], family, value), both[1:])
    assert both.dtype == np.uint8 and both.shape == BYTES.shape
    assert np.abs(both.astype(int) - BYTES).mean() > 3  # and it does something
    assert np.abs(both.astype(int) - transforms.transformed(BYTES, family, value * 1.4)).max() > 3


def held_out_problems(families):
    """What is wrong with held-out values."""
    for values in families:
        low, high = min(values.seen), max(values.seen)
        for v in values.interior:
            if v in values.seen or not low < v < high:
                yield f"{values.family} {v} is not between seen values"
        for v in values.exterior:
            if low <= v <= high:
                yield f"{values.family} {v} is not outside of the seen values"


def test_levels_are_what_they_are_called():
    assert not list(held_out_problems(catalogue.TRANSFORMS))
    swapped = catalogue.TRANSFORMS[0]
    wrong = catalogue.Values("google", "hue", swapped.seen, swapped.exterior, swapped.interior)
    assert len(list(held_out_problems([wrong]))) == 2
    for preset, count in (("smoke", 9), ("quick", 39), ("full", 62)):
        styles = catalogue.styles(preset)
        assert len({s.name for s in styles}) == len(styles) == count
        assert list(styles) == sorted(styles, key=lambda s: catalogue.LEVELS.index(s.level))
        seen = {s.family for s in styles if s.level == "seen" and s.family}
        assert seen == {s.family for s in styles if s.level in ("interior", "exterior")}
        assert not seen & {s.family for s in styles if s.level == "unseen family"}
        assert {s.source for s in styles} <= sources.STYLES.keys()
        assert {s.family for s in styles} - {""} <= transforms.FAMILIES.keys()


def test_names_that_are_held_out_are_measured_alone():
    names = pictures.known(pictures.tiny_base())
    found = pictures.shapes("google")
    train, test = (pictures.chosen(found, names, 9, kind) for kind in (False, True))
    assert len(train.label) == 9 and 2 <= len(test.label) <= 9
    kept = {p.pixels.tobytes() for p in found if p.held_out}
    assert {x.tobytes() for x in test.pixels} <= kept
    assert not {x.tobytes() for x in train.pixels} & kept
    assert train.words.max() < 10 and train.words.min() >= 1
    with pytest.raises(pictures.StageError, match="expected at least 2"):
        pictures.chosen(found, names, 1, True)

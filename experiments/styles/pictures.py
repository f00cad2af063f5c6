"""Stage `data`: base D, and the pictures of every style as the base's numbers.

Pictures come from a few sources and are made into styles when they are read, so what is kept is
small. A source gives the first pictures, in an order that follows from their names, of those whose
names base D was trained on, and of those that were held out from it. Every style is asked for by
one token, a style that base D knows (`--token`): nothing in it says which style is wanted, and the
base alone draws that one style.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pictures import base_d, classifier, sources
from experiments.pictures.card import NAME
from experiments.pictures.data import Pictures
from experiments.pictures.sources import Picture
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.styles.catalogue import Style, styles
from experiments.styles.settings import SHIPPED, TINY, Settings
from experiments.styles.transforms import transformed
from experiments.workdir import StageError, digest, save_array
from jlora.models import dit


class Drawn(NamedTuple):
    """Pictures of one style or source."""

    pixels: np.ndarray  # uint8 [n, 32, 32, 3]
    words: np.ndarray  # int32 [n, longest name], as base D numbers them
    label: np.ndarray  # int32 [n], the same


class World(NamedTuple):
    """What all later stages read."""

    settings: Settings
    base: base_d.BaseD
    known: Pictures  # the base's names by number, without pictures: for its classifier
    token: int  # number of the base's style by which pictures are asked for
    styles: tuple[Style, ...]
    train: dict[str, Drawn]  # by style
    test: dict[str, Drawn]  # names that base D never saw

    def at(self, *levels: str) -> tuple[Style, ...]:
        """The styles of some levels."""
        return tuple(style for style in self.styles if style.level in levels)


def tiny_base() -> base_d.BaseD:
    """A base of a few numbers at random, none of them zero: for tests and smoke runs."""
    vocabulary = [f"word{n}" for n in range(8)]
    names = {"styles": ["google"], "labels": ["disc", "square"], "vocabulary": vocabulary,
             "longest_name": 2}  # fmt: skip
    config = dit.DiTConfig(1, len(vocabulary) + 2, 8, 3, 16, 2, 2, 16, 4)
    random = np.random.default_rng(0)

    def drawn(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.3 * random.normal(size=shape.shape), jnp.float32)

    key, picture = jax.random.key(0), jnp.zeros((1, sources.SIDE, sources.SIDE, 3))
    network = classifier.Classifier(1, 2)
    judge: Any = jax.eval_shape(lambda: network.init(key, picture))["params"]
    params = jax.eval_shape(lambda: dit.init(key, config))
    both = jax.tree.map(drawn, (params, judge))
    return base_d.BaseD(config, *both, names, {})


def shapes(style: str) -> list[Picture]:
    """Forty discs and squares of many colours on white, for tests: they need no download."""
    random, out = np.random.default_rng(0), []
    rows, columns = np.mgrid[: sources.SIDE, : sources.SIDE] - (sources.SIDE - 1) / 2
    for n in range(40):
        size, disc = random.uniform(5, 13), n % 2 == 0
        far = np.hypot(rows, columns) if disc else np.maximum(abs(rows), abs(columns))
        paint = random.integers(0, 200, 3)
        pixels = np.where((far < size)[..., None], paint, 255).astype(np.uint8)
        words = (f"word{n % 8}", f"word{(n // 8) % 8}")
        label = "disc" if disc else "square"
        out.append(Picture(style, words, label, f"shape {n}", pixels))
    return out


@functools.cache
def base_of(folder: str) -> base_d.BaseD:
    """Base D of a folder, or the tiny one."""
    return tiny_base() if folder == TINY else base_d.load(_path(folder))


def _path(folder: str) -> Path:
    return base_d.FOLDER if folder == SHIPPED else Path(folder)


def fingerprint(folder: str) -> str:
    """sha256 of the base's card, which names all of its files; of the tiny base its name."""
    return TINY if folder == TINY else digest(_path(folder) / NAME)


def known(base: base_d.BaseD) -> Pictures:
    """The base's styles, labels and words as the numbering of `Pictures`, without pictures."""
    empty = np.zeros(0, np.int32)
    words = np.zeros((0, base.names["longest_name"]), np.int32)
    return Pictures(
        tuple(base.names["styles"]), tuple(base.names["labels"]), tuple(base.names["vocabulary"]),
        np.zeros((0, sources.SIDE, sources.SIDE, 3), np.uint8), empty, empty, words,
        np.zeros(0, bool),
    )  # fmt: skip


def order(picture: Picture) -> str:
    """Hex digits that put pictures in an order without any meaning."""
    return hashlib.sha256(f"order {picture.group}".encode()).hexdigest()


def chosen(candidates: list[Picture], names: Pictures, count: int, held_out: bool) -> Drawn:
    """The first pictures of a source, of one kind of name.

    Args:
      candidates: pictures of a source.
      names: numbers words and labels.
      count: at most so many.
      held_out: whether base D was kept from their names.

    Raises:
      StageError: fewer than two, or a label that the base does not know.
    """
    some = sorted((p for p in candidates if p.held_out == held_out), key=order)[:count]
    if len(some) < 2:
        raise StageError(f"{candidates[0].style}: got {len(some)} pictures, expected at least 2")
    if unknown := {p.label for p in some} - set(names.labels):
        raise StageError(
            f"{candidates[0].style}: got labels {sorted(unknown)}, unknown to the base"
        )
    return Drawn(
        np.stack([p.pixels for p in some]),
        np.stack([names.encode(p.words) for p in some]),
        np.asarray([names.labels.index(p.label) for p in some], np.int32),
    )


def prepare(context: Context) -> base_d.BaseD:
    """The base."""
    return base_of(_settings(context).base)


def _settings(context: Context) -> Settings:
    settings: Any = context.config  # stages need no more of it than its key
    return settings


def pieces(context: Context, base: base_d.BaseD) -> list[Piece]:
    """A file per source."""
    wanted = dict.fromkeys(style.source for style in styles(_settings(context).preset))
    make = functools.partial(_keep, context, base)
    return [Piece(f"{name}.npz", 1, functools.partial(make, name)) for name in wanted]


def _keep(context: Context, base: base_d.BaseD, name: str, folder: Path, bar: Progress) -> None:
    settings, names = _settings(context), known(base)
    gathered = shapes(name) if settings.base == TINY else sources.pictures((name,), context.cache)
    parts = {"train": chosen(gathered, names, settings.pictures, False),
             "test": chosen(gathered, names, settings.measured, True)}  # fmt: skip
    arrays = {f"{part}_{k}": x for part, drawn in parts.items()
              for k, x in drawn._asdict().items()}  # fmt: skip
    save_array(folder / f"{name}.npz", **arrays)
    bar.step(1)


def read(context: Context, base: base_d.BaseD, done: Done) -> World:
    """The world of a run.

    Raises:
      StageError: the base is not the one that the pictures were numbered for, or has no style of
        the name of the token.
    """
    settings, names = _settings(context), known(base)
    if done.info["base"] != fingerprint(settings.base):
        raise StageError(
            f"{settings.base}: got another base than the one of {done.path}; take another --workdir"
        )
    if settings.token not in names.styles:
        raise StageError(
            f"token: got {settings.token!r}, expected one of {', '.join(names.styles)}"
        )
    every = styles(settings.preset)
    kept: dict[str, dict[str, Drawn]] = {"train": {}, "test": {}}
    files = {}
    for source in dict.fromkeys(style.source for style in every):
        with np.load(done.path / f"{source}.npz", allow_pickle=False) as file:
            files[source] = dict(file)
    for style in every:
        for part, drawn in kept.items():
            pixels, words, label = (files[style.source][f"{part}_{k}"] for k in Drawn._fields)
            drawn[style.name] = Drawn(transformed(pixels, style.family, style.value), words, label)
    token = names.styles.index(settings.token) + 1
    return World(settings, base, names, token, every, kept["train"], kept["test"])


def describe(world: World) -> str:
    """The world in one line."""
    sizes = [len(drawn.label) for drawn in world.train.values()]
    counts = {level: len(world.at(level)) for level in dict.fromkeys(s.level for s in world.styles)}
    return (
        ", ".join(f"{n} {level}" for level, n in counts.items())
        + f" styles of {min(sizes)} to {max(sizes)} pictures"
    )


STAGE = Stage(
    name="data",
    inputs=(),
    unit="source",
    prepare=prepare,
    pieces=pieces,
    finish=lambda context, prepared, folder: {"base": fingerprint(_settings(context).base)},
    read=read,
    describe=describe,
)


def world_of(settings: Settings, workdir: Path, cache: Path | None = None) -> World:
    """The world alone: made on the first call.

    Args:
      settings: of the run.
      workdir: of the run.
      cache: of downloads.
    """
    config: Any = settings
    return STAGE.run(Context(config, workdir, cache))

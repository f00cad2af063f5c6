"""Stage `sample`: pictures drawn with adapters, and how far they are from real ones of the style.

Per style: Fréchet distance in the 64 features of base D's classifier to real held-out pictures of
that style, distance of the mean style features, and the share of pictures whose label the
classifier reads as asked. The classifier was trained on the base's styles, so the same figures of
real training pictures of the style stand next to them, and no figure of the literature compares.
The interpolations of the report are drawn here, too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pictures import classifier, quality
from experiments.pictures.data import bytes_of
from experiments.pictures.sources import SIDE
from experiments.pictures.train import bind
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.styles import conditions
from experiments.styles.catalogue import LEVELS
from experiments.styles.evaluate import BASE, FEW, OWN, SOUP, Scores, adapters, tuned
from experiments.styles.generate import STRIP, Written
from experiments.styles.pictures import Drawn, World
from experiments.workdir import save_array
from jlora.generation.diffusion.guidance import guided
from jlora.generation.diffusion.paths import rectified_flow
from jlora.generation.diffusion.samplers import Sampler, build
from jlora.models import dit

METHODS = (BASE, OWN, SOUP, "nearest", "ridge", FEW, "pdiff", "flow")
REAL = "real training pictures"
STRIPS = ("condition", "weight", "latent")
SHOWN = 8  # pictures of a strip


class Drawings(NamedTuple):
    """What was drawn, and its figures."""

    styles: tuple[str, ...]
    level: dict[str, str]
    pixels: dict[str, dict[str, np.ndarray]]  # style -> method -> uint8 [seeds, n, 32, 32, 3]
    figures: dict[str, dict[str, dict[str, list[float]]]]  # style -> method -> figure -> by seed
    strips: dict[str, np.ndarray]  # kind -> uint8 [STRIP, SHOWN, 32, 32, 3]


@functools.cache
def _sampler(config: dit.DiTConfig, steps: int) -> Any:
    shape = (SIDE, SIDE, config.channels)
    return build(guided(bind(config)), rectified_flow(), "velocity", shape, Sampler("euler", steps))


def draw(world: World, params: Any, words: np.ndarray, seed: int) -> np.ndarray:
    """Pictures of some names, uint8 [n, 32, 32, 3].

    Args:
      world: the base's architecture, the token, and how to sample.
      params: of the base with an adapter.
      words: int32 [n, k].
      seed: of the noise, which is the same for all adapters.
    """
    s = world.settings
    fold = functools.partial(jax.random.fold_in, jax.random.key(1000 + seed))
    keys = jax.vmap(fold)(np.arange(len(words)))
    condition = dit.Condition(jnp.full(len(words), world.token, jnp.int32), jnp.asarray(words))
    run = _sampler(world.base.config, s.sample_steps)
    return bytes_of(np.asarray(run(params, keys, condition, np.float32(s.guidance))))


def chosen(scores: Scores, count: int) -> tuple[str, ...]:
    """As many styles per level, evenly spaced."""
    out: list[str] = []
    for level in LEVELS:
        own = [style for style in scores.styles if scores.level[style] == level]
        some = np.linspace(0, len(own) - 1, min(count, len(own))).round().astype(int)
        out += [own[k] for k in some]
    return tuple(out)


def figures(
    world: World, features: conditions.Features, style: str, drawn: Drawn
) -> dict[str, float]:
    """Figures of pictures that were asked for by name in a style.

    Args:
      world: the classifier, and real held-out pictures of the style.
      features: sizes of the style features.
      style: whose.
      drawn: the pictures, with the labels that were asked for.
    """
    real = world.test[style].pixels
    read = functools.partial(classifier.apply, world.known, world.base.classifier)
    (h, _, label), (other, _, _) = read(drawn.pixels), read(real)
    mine, theirs = (conditions.features(world, x) / features.size for x in (drawn.pixels, real))
    return {
        "frechet": quality.frechet(h, other),
        "style distance": float(np.sqrt(((mine.mean(0) - theirs.mean(0)) ** 2).mean())),
        "label": float((label == drawn.label).mean()),
    }


def pieces(context: Context, prepared: None) -> list[Piece]:
    """A file per style, and one of interpolations."""
    scores: Scores = context.products["evaluate"]
    names = chosen(scores, context.products["data"].settings.sampled)
    out = [Piece(f"style_{k:03d}.npz", 1, functools.partial(_style, context, k, name))
           for k, name in enumerate(names)]  # fmt: skip
    return [*out, Piece("strips.npz", 1, functools.partial(_strips, context))]


def _asked(world: World, style: str) -> Drawn:
    """Held-out names to ask for, with their real pictures."""
    return Drawn(*(x[: world.settings.samples] for x in world.test[style]))


def _style(context: Context, k: int, style: str, folder: Path, bar: Progress) -> None:
    world, scores = context.products["data"], context.products["evaluate"]
    every = adapters(context, style)
    every[FEW] = every[f"{FEW} {scores.few_steps}"]
    words, arrays = _asked(world, style).words, {}
    for name in METHODS:
        if name in every:
            seeds = range(world.settings.sample_seeds)
            # a generator's samples take turns
            models = [tuned(world, every[name][seed % len(every[name])]) for seed in seeds]
            arrays[name] = np.stack(
                [draw(world, params, words, seed)
                 for seed, params in zip(seeds, models, strict=True)]
            )  # fmt: skip
    save_array(folder / f"style_{k:03d}.npz", **arrays)
    bar.step(1)


def _strips(context: Context, folder: Path, bar: Progress) -> None:
    world, written = context.products["data"], context.products["generate"]
    words = world.test[written.styles[0]].words[:SHOWN]
    arrays = {
        kind: np.stack([draw(world, tuned(world, written.strip(kind, n)), words, 0)
                        for n in range(STRIP)])
        for kind in STRIPS
    }  # fmt: skip
    save_array(folder / "strips.npz", **arrays)
    bar.step(1)


def _loaded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def read(context: Context, prepared: None, done: Done) -> Drawings:
    """Pictures and their figures."""
    world, scores = context.products["data"], context.products["evaluate"]
    written: Written = context.products["generate"]
    features = written.prepared.features
    names = chosen(scores, world.settings.sampled)
    pixels = {n: _loaded(done.path / f"style_{k:03d}.npz") for k, n in enumerate(names)}
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for style, by_method in pixels.items():
        asked, real = _asked(world, style), world.train[style]
        each = {
            name: [figures(world, features, style, asked._replace(pixels=one)) for one in some]
            for name, some in by_method.items()
        }
        count = len(asked.label)
        each[REAL] = [figures(world, features, style, Drawn(*(x[:count] for x in real)))]
        table[style] = {
            name: {key: [row[key] for row in rows] for key in rows[0]}
            for name, rows in each.items()
        }
    level = {name: scores.level[name] for name in names}
    return Drawings(names, level, pixels, table, _loaded(done.path / "strips.npz"))


def describe(drawings: Drawings) -> str:
    """The figures in one line."""
    means = {
        name: float(np.mean([np.mean(of[name]["frechet"]) for of in drawings.figures.values()]))
        for name in (BASE, OWN, "pdiff", "flow")
    }
    return "Fréchet distance " + ", ".join(f"{name} {value:.2f}" for name, value in means.items())


STAGE = Stage(
    name="sample",
    inputs=("data", "zoo", "generate", "evaluate"),
    unit="style",
    pieces=pieces,
    read=read,
    describe=describe,
)

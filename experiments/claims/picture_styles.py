"""What claims on base D share: its pictures, styles that it does not know, and who judges them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jlora as jl
from experiments.pictures import base_d, classifier, data, sources
from experiments.pictures import train as base_training
from experiments.styles import distill
from experiments.styles.transforms import transformed
from experiments.workdir import StageError
from jlora.generation.baselines import logistic

# sha256 of model.safetensors of base D
WEIGHTS = "e1e2b662be7ca6a5fc717543ac297dcc530b06dfac1c341d10910301815e6eff"
GUIDANCE = 2.0  # of the base's card
STYLED = distill.Recipe(distill.STYLE_SITES, 4, 8.0, 60, 8, 3e-3)  # of an adapter of a style
PENALTY, JUDGED = 1.0, 400  # of the logistic regression, and real pictures of each kind, at most


class World(NamedTuple):
    """Base D and its pictures."""

    base: base_d.BaseD
    pictures: data.Pictures


class Asked(NamedTuple):
    """Pictures that are asked for, real ones that they are compared with, and a judge's data."""

    name: str  # of the style
    token: np.ndarray  # int32 [n], the base's style
    words: np.ndarray  # int32 [n, k], names that base D was not trained on
    real: np.ndarray  # [m, 64], features of real held-out pictures of the style
    examples: np.ndarray  # [l, 64], features of real training pictures, half of them in the style
    labels: np.ndarray  # int64 [l], 1: in the style; all 0 for a style of the base


@functools.cache
def world(folder: Path, weights: str | None) -> World:
    """The base of a folder with the pictures that it was trained on.

    Raises:
      StageError: another base, or pictures that it does not number in the same way.
    """
    base = base_d.load(folder, weights)
    styles = tuple(base.names["styles"])
    pictures = data.gathered(sources.pictures(styles), styles)
    if list(pictures.vocabulary) != base.names["vocabulary"]:
        raise StageError(f"{folder}: got another vocabulary than that of the pinned pictures")
    return World(base, pictures)


def read(world: World, pixels: np.ndarray) -> np.ndarray:
    """Features of pictures, [n, 64]."""
    return classifier.apply(world.pictures, world.base.classifier, pixels)[0]


def asked(world: World, source: str, family: str, value: float, each: int) -> Asked:
    """Held-out names in a style.

    Args:
      world: base and pictures.
      source: style of the base by which it is asked for.
      family: key of `transforms.FAMILIES`; "": the base's style itself.
      value: of the family.
      each: names.
    """
    own = world.pictures.style == world.pictures.styles.index(source) + 1
    held = np.flatnonzero(own & world.pictures.held_out)
    rows = np.random.default_rng(0).permutation(held)[:each]
    known = np.flatnonzero(own & ~world.pictures.held_out)
    known = np.random.default_rng(1).permutation(known)[:JUDGED]
    plain = world.pictures.pixels[known]
    both = [read(world, x) for x in (plain, *[transformed(plain, family, value)] * bool(family))]
    return Asked(
        f"{source} {family} {value:g}" if family else source,
        world.pictures.style[rows], world.pictures.words[rows],
        read(world, transformed(world.pictures.pixels[held], family, value)),
        np.concatenate(both), np.repeat(np.arange(len(both)), len(known)),
    )  # fmt: skip


def judged(one: Asked, features: np.ndarray) -> np.ndarray:
    """Whether pictures have the style, bool [n].

    Args:
      one: real pictures with and without the style.
      features: of the pictures, [n, 64].
    """
    said = logistic.scores(one.examples, one.labels, features, PENALTY)
    return said[:, 1] > said[:, 0]


def score(one: Asked, features: np.ndarray) -> float:
    """The share of pictures that have the style."""
    return float(judged(one, features).mean())


def styled(
    world: World, source: str, family: str, value: float, recipe: distill.Recipe, seed: int
) -> jl.Adapter:
    """The adapter of a style, of training pictures; nothing of it is distilled."""
    token = world.pictures.styles.index(source) + 1
    own = np.flatnonzero((world.pictures.style == token) & ~world.pictures.held_out)
    pixels = transformed(world.pictures.pixels[own], family, value)

    def rows(step: int) -> Any:
        chosen = np.random.default_rng([seed, step]).integers(0, len(own), recipe.batch)
        condition = base_training.batch(world.pictures, own[chosen])[1]
        return data.scaled(pixels[chosen]), condition

    return distill.train(world.base, recipe, rows, seed)[0]

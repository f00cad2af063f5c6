"""LCM-LoRA: four jumps with the distilled LoRA are better than four steps of the base's sampler.

tau is distilled from base D alone. A style adapter is trained without it, on pictures of a style
that neither has seen, and `0.8 style + tau` is compared with the style adapter and its own sampler
at as many steps. Measured is the Fréchet distance to real held-out pictures in the features of
base D's classifier, and the style score: the share of pictures that a logistic regression on these
features, fitted on real training pictures with and without the style, says to have it. Seed 0 also
measures other numbers of steps, for the plot of `experiments.styles.lines`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d, classifier, data, quality, sampling, sources
from experiments.pictures import settings as flags
from experiments.pictures import train as base_training
from experiments.styles import distill
from experiments.styles.transforms import transformed
from experiments.workdir import StageError
from jlora.generation.baselines import logistic
from jlora.merging.exact.lcm_arithmetic import lcm_arithmetic

WEIGHTS = "not shipped yet"  # sha256 of model.safetensors of base D
STYLES = (("google", "hue", 180.0), ("google", "invert", 1.0))  # source, family, value
STEPS, LINES = 4, (1, 2, 4, 8, 32)  # of the claim; of the plot
GUIDANCE = 2.0  # of the base's card; the teacher's, and Euler's where nothing is distilled
PENALTY = 1.0  # of the logistic regression


class Sizes(NamedTuple):
    """How much of everything."""

    distilled: distill.Recipe = distill.Recipe(distill.SITES, 32, 32.0, 200, 16, 1e-3, GUIDANCE)
    styled: distill.Recipe = distill.Recipe(distill.STYLE_SITES, 4, 8.0, 60, 8, 3e-3)
    each: int = 50  # pictures per style of a measurement
    lines: tuple[int, ...] = LINES


SIZES = Sizes()


class World(NamedTuple):
    """Base D and its pictures."""

    base: base_d.BaseD
    found: data.Pictures


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
    found = data.gathered(sources.pictures(styles), styles)
    if list(found.vocabulary) != base.names["vocabulary"]:
        raise StageError(f"{folder}: got another vocabulary than that of the pinned pictures")
    return World(base, found)


def read(found: World, pixels: np.ndarray) -> np.ndarray:
    """Features of pictures, [n, 64]."""
    return classifier.apply(found.found, found.base.classifier, pixels)[0]


def asked(found: World, source: str, family: str, value: float, each: int) -> Asked:
    """Held-out names in a style.

    Args:
      found: base and pictures.
      source: style of the base by which it is asked for.
      family: key of `transforms.FAMILIES`; "": the base's style itself.
      value: of the family.
      each: names.
    """
    own = found.found.style == found.found.styles.index(source) + 1
    held = np.flatnonzero(own & found.found.held_out)
    rows = np.random.default_rng(0).permutation(held)[:each]
    known = np.flatnonzero(own & ~found.found.held_out)[:400]
    plain = found.found.pixels[known]
    both = [read(found, x) for x in (plain, *[transformed(plain, family, value)] * bool(family))]
    return Asked(
        f"{source} {family} {value:g}" if family else source,
        found.found.style[rows], found.found.words[rows],
        read(found, transformed(found.found.pixels[held], family, value)),
        np.concatenate(both), np.repeat(np.arange(len(both)), len(known)),
    )  # fmt: skip


def measured(found: World, one: Asked, pixels: np.ndarray) -> dict[str, float]:
    """Fréchet distance of pictures, and the score of a style that the base does not know."""
    h = read(found, pixels)
    out = {"FID": quality.frechet(h, one.real)}
    if one.labels.any():
        out["style score"] = score(one, h)
    return out


def score(one: Asked, features: np.ndarray) -> float:
    """The share of pictures that have the style."""
    said = logistic.scores(one.examples, one.labels, features, PENALTY)
    return float((said[:, 1] > said[:, 0]).mean())


def drawn(
    found: World, adapter: jl.Adapter | None, one: Asked, steps: int, seed: int, distilled: bool
) -> dict[str, float]:
    """Figures of pictures that are drawn with an adapter, by jumps or by Euler's method."""
    base = found.base
    params = base.params if adapter is None else jl.merge(base.params, adapter)
    if distilled:
        pixels = distill.sample(params, base.config, one.token, one.words, steps, seed)
    else:
        pixels = sampling.sample(
            params, base.config, one.token, one.words, steps, GUIDANCE, seed
        )  # fmt: skip
    return measured(found, one, pixels)


def distilled(found: World, sizes: Sizes, seed: int) -> jl.Adapter:
    """tau, of the pictures that base D was trained on."""
    plan = flags.Settings(batch=sizes.distilled.batch, seed=seed)

    def rows(step: int) -> Any:
        return base_training.batch(found.found, base_training.rows(found.found, plan, step))

    return distill.train(found.base, sizes.distilled, rows, seed)[0]


def styled(
    found: World, source: str, family: str, value: float, sizes: Sizes, seed: int
) -> jl.Adapter:
    """The adapter of a style, of training pictures; nothing of it is distilled."""
    token = found.found.styles.index(source) + 1
    own = np.flatnonzero((found.found.style == token) & ~found.found.held_out)
    pixels = transformed(found.found.pixels[own], family, value)

    def rows(step: int) -> Any:
        chosen = np.random.default_rng([seed, step]).integers(0, len(own), sizes.styled.batch)
        condition = base_training.batch(found.found, own[chosen])[1]
        return data.scaled(pixels[chosen]), condition

    return distill.train(found.base, sizes.styled, rows, seed)[0]


def figures(seed: int, found: World, sizes: Sizes = SIZES) -> Figures:
    """Fréchet distances of one seed, and its style scores.

    Args:
      seed: of adapters and noise.
      found: base and pictures.
      sizes: how much of everything.
    """
    tau = distilled(found, sizes, seed)
    wrong = distill.turned(tau, seed)
    values: dict[str, list[float]] = {"system": [], "baseline": [], "control": []}
    units, more = [], {}
    plain = [(name, "", 0.0) for name in found.found.styles]
    for source, family, value in (*plain, *STYLES):
        one = asked(found, source, family, value, sizes.each)
        style = styled(found, source, family, value, sizes, seed) if family else None
        both, control = (x if style is None else lcm_arithmetic(style, x) for x in (tau, wrong))
        kinds = {"system": (both, True), "baseline": (style, False), "control": (control, True)}
        for steps in sizes.lines if seed == 0 else (STEPS,):
            for kind, (adapter, by_jumps) in kinds.items():
                if kind == "control" and steps != STEPS:
                    continue
                got = drawn(found, adapter, one, steps, seed, by_jumps)
                more |= {f"{one.name}: {kind}, {steps} steps: {k}": v for k, v in got.items()}
        for kind in kinds:
            values[kind].append(more[f"{one.name}: {kind}, {STEPS} steps: FID"])
        units.append(one.name)
        if family:
            more[f"{one.name}: real pictures: style score"] = score(one, one.real)
    return Figures(tuple(units), *(tuple(values[k]) for k in values), more=more)


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; nothing is shared by seeds."""
    return figures(seed, world(base_d.FOLDER, WEIGHTS))


CLAIM = Claim(
    name="lcm_lora",
    systems=("LCM-LoRA", "LCM-LoRA arithmetic"),
    statement=f"Fréchet distance to real pictures after {STEPS} evaluations: base + tau < the base "
    f"with Euler's method (DDIM of its flow) and guidance {GUIDANCE}, on the base's styles; and "
    "base + 0.8 style + tau < base + style, on styles that tau never saw, where the style score "
    "is to be at least 95 % of that of the style alone (it is kept with the record)",
    reference="Luo 2023, 2311.05556: few-step quality of the base and of styled models, figure 3",
    baseline="the same model without tau, as many steps of Euler's method with guidance",
    control="tau with inputs and outputs of every site permuted: equal norms, other directions",
    unit="Fréchet distance in the features of base D's classifier, per style",
    assets=("emoji_google", "emoji_twitter", "mnist", "fashion_mnist"),
    run=run,
    less_is_better=True,
)

"""LCM-LoRA: four jumps with the distilled LoRA are better than four steps of the base's sampler.

tau is distilled from base D alone. A style adapter is trained without it, on pictures of a style
that neither has seen, and `0.8 style + tau` is compared with the style adapter and its own sampler
at as many steps. Measured is the Fréchet distance to real held-out pictures in the features of
base D's classifier, and the style score: the share of pictures that a logistic regression on these
features, fitted on real training pictures with and without the style, says to have it. Seed 0 also
measures other numbers of steps, for the plot of `experiments.styles.lines`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jlora as jl
from experiments.claims import picture_styles as styles
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d, quality, sampling
from experiments.pictures import settings as flags
from experiments.pictures import train as base_training
from experiments.styles import distill
from jlora.merging.exact.lcm_arithmetic import lcm_arithmetic

STYLES = (("google", "hue", 180.0), ("google", "invert", 1.0))  # source, family, value
STEPS, LINES = 4, (1, 2, 4, 8, 32)  # of the claim; of the plot


class Sizes(NamedTuple):
    """How much of everything."""

    distilled: distill.Recipe = distill.Recipe(
        distill.SITES, 32, 32.0, 300, 16, 1e-3, styles.GUIDANCE
    )
    styled: distill.Recipe = styles.STYLED
    each: int = 50  # pictures per style of a measurement
    lines: tuple[int, ...] = LINES


SIZES = Sizes()


def measured(world: styles.World, one: styles.Asked, pixels: np.ndarray) -> dict[str, float]:
    """Fréchet distance of pictures, and the score of a style that the base does not know."""
    h = styles.read(world, pixels)
    out = {"FID": quality.frechet(h, one.real)}
    if one.labels.any():
        out["style score"] = styles.score(one, h)
    return out


def drawn(
    world: styles.World,
    adapter: jl.Adapter | None,
    one: styles.Asked,
    steps: int,
    seed: int,
    distilled: bool,
) -> dict[str, float]:
    """Figures of pictures that are drawn with an adapter, by jumps or by Euler's method."""
    base = world.base
    params = base.params if adapter is None else jl.merge(base.params, adapter)
    if distilled:
        pixels = distill.sample(params, base.config, one.token, one.words, steps, seed)
    else:
        pixels = sampling.sample(
            params, base.config, one.token, one.words, steps, styles.GUIDANCE, seed
        )  # fmt: skip
    return measured(world, one, pixels)


def distilled(world: styles.World, sizes: Sizes, seed: int) -> jl.Adapter:
    """tau, of the pictures that base D was trained on."""
    plan = flags.Settings(batch=sizes.distilled.batch, seed=seed)

    def rows(step: int) -> Any:
        return base_training.batch(world.pictures, base_training.rows(world.pictures, plan, step))

    return distill.train(world.base, sizes.distilled, rows, seed)[0]


def figures(seed: int, world: styles.World, sizes: Sizes = SIZES) -> Figures:
    """Fréchet distances of one seed, and its style scores.

    Args:
      seed: of adapters and noise.
      world: base and pictures.
      sizes: how much of everything.
    """
    tau = distilled(world, sizes, seed)
    wrong = distill.turned(tau, seed)
    values: dict[str, list[float]] = {"system": [], "baseline": [], "control": []}
    units, more = [], {}
    plain = [(name, "", 0.0) for name in world.pictures.styles]
    for source, family, value in (*plain, *STYLES):
        one = styles.asked(world, source, family, value, sizes.each)
        style = styles.styled(world, source, family, value, sizes.styled, seed) if family else None
        both, control = (x if style is None else lcm_arithmetic(style, x) for x in (tau, wrong))
        kinds = {"system": (both, True), "baseline": (style, False), "control": (control, True)}
        for steps in sizes.lines if seed == 0 else (STEPS,):
            for kind, (adapter, by_jumps) in kinds.items():
                if kind == "control" and steps != STEPS:
                    continue
                got = drawn(world, adapter, one, steps, seed, by_jumps)
                more |= {f"{one.name}: {kind}, {steps} steps: {k}": v for k, v in got.items()}
        for kind in kinds:
            values[kind].append(more[f"{one.name}: {kind}, {STEPS} steps: FID"])
        units.append(one.name)
        if family:
            more[f"{one.name}: real pictures: style score"] = styles.score(one, one.real)
    return Figures(tuple(units), *(tuple(values[k]) for k in values), more=more)


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; nothing is shared by seeds."""
    return figures(seed, styles.world(base_d.FOLDER, styles.WEIGHTS))


CLAIM = Claim(
    name="lcm_lora",
    systems=("LCM-LoRA", "LCM-LoRA arithmetic"),
    statement=f"Fréchet distance to real pictures after {STEPS} evaluations: base + tau < the "
    f"base with Euler's method (DDIM of its flow) and guidance {styles.GUIDANCE}, on the base's "
    "styles; and base + 0.8 style + tau < base + style, on styles that tau never saw, where the "
    "style score is to be at least 95 % of that of the style alone (it is kept with the record)",
    reference="Luo 2023, 2311.05556: few-step quality of the base and of styled models, figure 3",
    baseline="the same model without tau, as many steps of Euler's method with guidance",
    control="tau with inputs and outputs of every site permuted: equal norms, other directions",
    unit="Fréchet distance in the features of base D's classifier, per style",
    assets=("emoji_google", "emoji_twitter", "mnist", "fashion_mnist"),
    run=run,
    less_is_better=True,
)

r"""Cond P-Diff on styles: pictures of generated adapters are as good as those of the style's soup.

==========  ==============================================================================
t           seen style of four, of which RUNS adapters with SNAPSHOTS each were trained
c_t         condition: what base D's classifier sees in 8 training pictures of the style
x_stk       Fréchet distance to real pictures of the style, of pictures drawn with the
            k-th adapter that the generator of seed s writes for c_t
y_st        the same of the soup: the mean delta of the style's own trained adapters
z_stk       control: the same generator, asked with the condition of another style
==========  ==============================================================================

.. math:: x_{stk} < 1.02 \, y_{st}

No normaliser of the generator knows the style: what is right for it can come from its condition
alone. The published networks (1-D U-Net over the convolutional autoencoder) are measured on the
same rows, with statistics of the whole zoo and, for seed 0, with those of the style that is asked
for, which hold its soup. So are the base, one trained adapter and the mean adapter of all styles.
Names are held out from base D; pictures of all adapters begin with the same noise.

Deviates: styles are transforms of one artist's drawings, where the paper has paintings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims.picture_styles import WEIGHTS
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d, classifier, quality, sampling, sources
from experiments.stages.zoo_training import snapshot_steps
from experiments.styles import conditions, generators, pdiff, zoo_training
from experiments.styles.catalogue import Style
from experiments.styles.pictures import World, chosen, known
from experiments.styles.settings import Settings
from experiments.styles.transforms import transformed
from experiments.styles.zoo import Zoo
from jlora.generation.baselines import soup

SOURCE = "google"
STYLES = (("invert", 1.0), ("ground", 216.0), ("saturation", 0.0), ("lines", 4.0))
FACTOR = 1.02  # of the soup's distance


class Sizes(NamedTuple):
    """How much of everything."""

    settings: Settings = Settings(
        pictures=256, measured=50, zoo_seeds=2, zoo_snapshots=3, draws=3, flow_steps=300, width=64,
        depth=2, pdiff_ae_steps=200, pdiff_ae_width=8, pdiff_steps=400, samples_each=2,
        sample_steps=12, guidance=2.0,
    )  # fmt: skip


SIZES = Sizes()


class Shared(NamedTuple):
    """What all seeds read."""

    world: World
    zoo: Zoo
    given: generators.Examples
    asked: jax.Array  # [styles, 2 F], centred
    soups: jl.Adapter  # a bank, one per style, in the common basis
    real: tuple[np.ndarray, ...]  # features of real held-out pictures, by style


def world_of(settings: Settings) -> World:
    """Base D, and the styles' pictures."""
    base = base_d.load(base_d.FOLDER, WEIGHTS)
    names, drawings = known(base), sources.pictures((SOURCE,))
    styles = tuple(Style(f"{SOURCE} {f} {v:g}", "seen", SOURCE, f, v) for f, v in STYLES)
    parts = []
    for count, held_out in ((settings.pictures, False), (settings.measured, True)):
        plain = chosen(drawings, names, count, held_out)
        parts.append({s.name: plain._replace(pixels=transformed(plain.pixels, s.family, s.value))
                      for s in styles})  # fmt: skip
    token = names.styles.index(settings.token) + 1
    return World(settings, base, names, token, styles, *parts)


def trained(world: World) -> Zoo:
    """The adapters of all styles; every run starts from the same A.

    Raises:
      FloatingPointError: a loss that is not finite.
    """
    s, base, form = world.settings, world.base, zoo_training.template(world)
    marks = tuple(int(m) for m in snapshot_steps(s.zoo_snapshots, s.zoo_steps))
    plan = zoo_training.Recipe(s.zoo_steps, marks, s.zoo_lr, s.zoo_batch, s.drop, s.seed)
    runs, kept, losses = [], [], []
    for number in range(s.zoo_seeds):
        own = [zoo_training.Run(f"{x.name}/{number}", x.name, number) for x in world.styles]
        pool = zoo_training.pool(own, [world.train[run.style] for run in own], s.pictures)
        state = zoo_training.initial(form.trainable, plan, len(own))
        for begin in range(0, s.zoo_steps, s.zoo_segment):
            length = min(s.zoo_segment, s.zoo_steps - begin)
            state = zoo_training.segment(
                base.config, plan, length, base.params, form, jnp.int32(world.token), pool, state,
                jnp.int32(begin),
            )  # fmt: skip
        if not np.isfinite(np.asarray(state.loss)).all():
            raise FloatingPointError(f"run {number}: the loss of an adapter is not finite")
        runs += own
        kept.append(jax.tree.map(np.asarray, state.snapshots))
        losses.append(np.asarray(state.loss))
    whole = jax.tree.map(lambda *xs: np.concatenate(xs), *kept)
    return Zoo(form, whole, tuple(runs), np.concatenate(losses))


@functools.cache
def shared(sizes: Sizes) -> Shared:
    """World, zoo, conditions and soups."""
    world = world_of(sizes.settings)
    zoo, features = trained(world), conditions.all_features(world)
    given = generators.examples(world, zoo, features)
    raw = [conditions.condition(world, features, style.name) for style in world.styles]
    asked = jnp.asarray(np.stack(raw)) - given.centre[None]
    soups = soup.fit(jax.random.key(0), given.conditions, given.tasks, given.bank).soups
    real = tuple(read(world, world.test[style.name].pixels) for style in world.styles)
    return Shared(world, zoo, given, asked, soups, real)


def read(world: World, pixels: np.ndarray) -> np.ndarray:
    """Features of base D's classifier, [n, 64]."""
    return classifier.apply(world.known, world.base.classifier, pixels)[0]


def distance(every: Shared, adapter: jl.Adapter | None, style: int) -> float:
    """Fréchet distance of pictures that are drawn with an adapter, to real ones of a style.

    Args:
      every: world and real pictures.
      adapter: None: base D as it is.
      style: number of the style.
    """
    world, s = every.world, every.world.settings
    params = world.base.params if adapter is None else jl.merge(world.base.params, adapter)
    words = world.test[world.styles[style].name].words
    token = np.full(len(words), world.token, np.int32)
    pixels = sampling.sample(
        params, world.base.config, token, words, s.sample_steps, s.guidance, 1000
    )
    return quality.frechet(read(world, pixels), every.real[style])


def knowing(every: Shared, key: jax.Array) -> Callable[[jax.Array, int], jl.Adapter]:
    """The published networks with mean and deviation of the style that is asked for.

    Args:
      every: zoo and conditions.
      key: of training.

    Returns:
      (key, number of the style) -> adapter.
    """
    given, own = every.given, generators.pdiff_config(every.world.settings)
    theta, task = given.theta[given.adapter], np.asarray(given.tasks)
    parts = [theta[np.flatnonzero(task == k)] for k in range(len(every.world.styles))]
    mean = jnp.stack([x.mean(0) for x in parts])
    size = jnp.stack([x.std(0) for x in parts])
    size = jnp.where(size > 1e-8, size, jnp.ones_like(size))
    state = pdiff.fit(key, given.conditions, (theta - mean[task]) / size[task], own)

    def write(key: jax.Array, style: int) -> jl.Adapter:
        w = pdiff.generate(key, state, every.asked[style], own)
        return pdiff.unflat(every.zoo.template, mean[style] + size[style] * w)

    return write


def figures(seed: int, sizes: Sizes = SIZES) -> Figures:
    """Fréchet distances per style and generated adapter, one seed.

    Args:
      seed: of the generators and what they draw; the zoo is the same for all.
      sizes: how much of everything.
    """
    every, s = shared(sizes), sizes.settings
    count, key = len(every.world.styles), jax.random.key(seed)
    ways: dict[str, Callable[[jax.Array, int], jl.Adapter]] = {}
    for name in ("flow", "pdiff"):
        state = generators.fitted(name, key, every.given, s)
        write = generators.writer(name, state, every.zoo, s)
        ways[name] = lambda key, k, write=write: write(key, every.asked[k])
    if seed == 0:
        ways["pdiff, statistics of the style"] = knowing(every, key)
    draw = lambda k, n: jax.random.fold_in(key, 100 * k + n)  # noqa: E731
    sides: dict[str, list[float]] = {"system": [], "baseline": [], "control": []}
    units, more = [], {}
    for k, style in enumerate(every.world.styles):
        soup_of = every.soups.replace(
            trainable=jax.tree.map(lambda x, k=k: x[k], every.soups.trainable),
            frozen=jax.tree.map(lambda x, k=k: x[k], every.soups.frozen),
        )
        best = distance(every, soup_of, k)
        more[f"{style.name}: soup: FID"] = best
        other = (k + 1) % count
        for n in range(s.samples_each):
            units.append(f"{style.name}/{n}")
            sides["system"].append(distance(every, ways["flow"](draw(k, n), k), k))
            sides["baseline"].append(FACTOR * best)
            sides["control"].append(distance(every, ways["flow"](draw(k, n), other), k))
        for name, write in ways.items():
            if name != "flow":
                more[f"{style.name}: {name}: FID"] = distance(every, write(draw(k, 0), k), k)
        if seed == 0:
            middle = jax.tree.map(lambda x: x.mean(0), every.soups.trainable)
            rivals = {"base": None, "one trained adapter": every.zoo.last(style.name),
                      "mean of all styles": soup_of.replace(trainable=middle)}  # fmt: skip
            more |= {f"{style.name}: {name}: FID": distance(every, adapter, k)
                     for name, adapter in rivals.items()}  # fmt: skip
    return Figures(tuple(units), *(tuple(x) for x in sides.values()), more=more)


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; the zoo of trained adapters is shared."""
    return figures(seed)


CLAIM = Claim(
    name="cond_pdiff_styles",
    systems=(
        "Conditional flow over adapters",
        "Conditional P-Diff: 1-D convolutional U-Net",
        "Conditional P-Diff: convolutional autoencoder",
    ),
    statement=f"Fréchet distance of four seen styles: generated adapters < {FACTOR} times that of "
    "the soup of the style's trained adapters, without statistics of the style",
    reference="Jin 2024, 2408.01415: generated style adapters match trained ones in FID",
    baseline=f"{FACTOR} times the distance of the mean of the style's trained adapters",
    control="the condition of another style",
    unit="Fréchet distance in the features of base D's classifier",
    assets=("emoji_google",),
    run=run,
    less_is_better=True,
)

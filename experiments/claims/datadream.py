r"""DataDream: pictures that an adapted base D draws teach base C more than four real ones a class.

A style that neither base has seen has SHOTS drawings of each category of emoji. LoRA on base D,
trained on them, draws more: base D is asked for emoji that it knows, by name, and the category of
an emoji is known from its name. Then LoRA on base C learns the categories among their texts, from
the real drawings and the synthetic ones, and is measured on drawings of names that neither base has
been trained on in any style.

.. math:: \text{accuracy}\bigl(\lambda L_{\text{real}} + (1 - \lambda) L_{\text{synthetic}}\bigr) >
          \text{accuracy}(L_{\text{real}})

Steps, pictures per step and learning rate are the same for all; the rate is the best of the
baseline on drawings of the style that are no test pictures, for shots of another seed. Everything
is trained on pictures that are moved and mirrored. Kept with the record: real pictures without
that, synthetic ones alone, base C as it is, Fréchet distances to real test drawings.

Deviates: a category is asked for by names, since the words of base D have none for it; one adapter
of base D for all categories.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import clip_training as clip
from experiments.claims import picture_styles as pictures
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d, quality, sampling, sources
from experiments.pictures.classifier import moved
from experiments.pictures.data import scaled
from experiments.styles import distill
from jlora.generation.diffusion.synthetic_shots import balanced, mixture
from jlora.models import dit

STYLES = ("openmoji", "outline")
SOURCE = "google"  # the style by which base D is asked
SHARE = 0.8  # lambda, of the official script
METHOD = jl.LoRA(rank=8, alpha=8.0)  # of base C
TUNING = 1000


class Sizes(NamedTuple):
    """How much of everything."""

    shots: int = 4  # real drawings of each category
    drawer: distill.Recipe = distill.Recipe(distill.STYLE_SITES, 8, 16.0, 100, 8, 3e-3)
    each: int = 40  # synthetic pictures of each category
    sample_steps: int = 12  # Euler steps of one
    steps: int = 60  # of base C, of BATCH real and BATCH synthetic pictures each
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # of base C


SIZES = Sizes()


class Few(NamedTuple):
    """What a user has of a style, and what it is measured on."""

    labels: tuple[str, ...]
    head: clip.Head
    shots: clip.Rows
    condition: dit.Condition  # of the shots: SOURCE and their names
    rest: clip.Rows  # drawings of training names that are no shots
    test: clip.Rows  # of held-out names


@functools.cache
def drawings(style: str) -> tuple[tuple[sources.Picture, ...], tuple[str, ...]]:
    """All drawings of a style, and their categories."""
    found = tuple(sources.pictures((style,)))
    return found, tuple(sorted({p.label for p in found}))


def few(world: pictures.World, style: str, shots: int, seed: int) -> Few:
    """Shots of a style; arguments as of `figures`."""
    found, labels = drawings(style)

    def rows(chosen: list[sources.Picture]) -> clip.Rows:
        numbers = np.asarray([labels.index(p.label) for p in chosen], np.int32)
        return clip.Rows(np.stack([p.pixels for p in chosen]), numbers)

    known = [p for p in found if not p.held_out]
    order = np.random.default_rng([seed, shots]).permutation(len(known))
    label = np.asarray([labels.index(p.label) for p in known])[order]
    picked = np.concatenate([order[label == k][:shots] for k in range(len(labels))])
    others = np.setdiff1d(order, picked)
    own = [known[k] for k in picked]
    words = np.stack([world.pictures.encode(p.words) for p in own])
    token = np.full(len(own), world.pictures.styles.index(SOURCE) + 1, np.int32)
    return Few(
        labels, clip.head_of(labels, len(labels)), rows(own),
        dit.Condition(jnp.asarray(token), jnp.asarray(words)), rows([known[k] for k in others]),
        rows([p for p in found if p.held_out]),
    )  # fmt: skip


def drawer(world: pictures.World, given: Few, recipe: distill.Recipe, seed: int) -> jl.Adapter:
    """LoRA of base D, trained on the shots."""
    x, count = scaled(given.shots.pixels), len(given.shots.label)

    def rows(step: int) -> Any:
        pick = np.random.default_rng([seed, step]).integers(0, count, recipe.batch)
        return x[pick], jax.tree.map(lambda v: v[pick], given.condition)

    return distill.train(world.base, recipe, rows, seed)[0]


def synthetic(
    world: pictures.World, adapter: jl.Adapter | None, labels: tuple[str, ...], sizes: Sizes,
    seed: int,
) -> clip.Rows:  # fmt: skip
    """Pictures that base D draws of emoji that it knows, equally many of each category.

    Args:
      world: base D and its pictures.
      adapter: of the style; None: base D as it is.
      labels: the categories.
      sizes: how much of everything.
      seed: of the choice of names and of the noise.
    """
    every = world.pictures
    own = np.flatnonzero((every.style == every.styles.index(SOURCE) + 1) & ~every.held_out)
    numbers = np.asarray([labels.index(every.labels[k]) for k in every.label[own]])
    chosen = own[balanced(jax.random.key(seed), numbers, len(labels), sizes.each)]
    params = world.base.params if adapter is None else jl.merge(world.base.params, adapter)
    pixels = sampling.sample(
        params, world.base.config, every.style[chosen], every.words[chosen], sizes.sample_steps,
        pictures.GUIDANCE, seed,
    )  # fmt: skip
    return clip.Rows(pixels, np.repeat(np.arange(len(labels), dtype=np.int32), sizes.each))


def batches(rows: clip.Rows, steps: int, seed: int, augmented: bool) -> tuple[Any, Any]:
    """Pictures and labels of a run, [steps, BATCH, ...]; moved and mirrored at random if asked."""
    pixels, label = clip.drawn(rows, steps, seed)
    if augmented:
        random = np.random.default_rng([seed, 11])
        flat = moved(pixels.reshape(-1, *pixels.shape[2:]), random)
        turned = random.random(len(flat)) < 0.5
        flat = np.where(turned[:, None, None, None], flat[:, :, ::-1], flat)
        pixels = flat.reshape(pixels.shape)
    return pixels, label


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(apply, sites, params, trainable, frozen, head, real, second, rate):
    tuned, rule = jl.lift(apply), optax.adam(rate)
    cross = optax.softmax_cross_entropy_with_integer_labels

    def loss(trainable, *both):
        adapter = jl.Adapter(trainable, frozen, sites)
        one, other = (
            cross(tuned(params, adapter, (x.astype(jnp.float32) - 127.5) / 127.5, head), y)
            for x, y in both
        )
        return mixture(one, other, SHARE)

    def step(carry, both):
        one, state = carry
        grads = jax.grad(loss)(one, *both)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(grads, state, one)
        return (optax.apply_updates(one, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        begin = trainable, rule.init(trainable)
    return jax.lax.scan(step, begin, (real, second))[0][0]


def learned(
    given: Few, real: clip.Rows, second: clip.Rows, rate: float, sizes: Sizes, seed: int,
    augmented: bool = True,
) -> Any:  # fmt: skip
    """Weights of base C after LoRA on two sets of pictures.

    Args:
      given: the style.
      real: the first set, of weight SHARE.
      second: the other one; the same rows again where there are none but real ones.
      rate: of Adam.
      sizes: how much of everything.
      seed: of the start and the batches.
      augmented: whether pictures are moved and mirrored.
    """
    c = clip.base()
    apply = clip.classifier(c.config)
    start = clip.fresh(apply, c.params, given.head, METHOD, seed)
    both = (batches(r, sizes.steps, 2 * seed + k, augmented) for k, r in enumerate((real, second)))
    trainable = _fit(
        apply, start.sites, c.params, start.trainable, start.frozen, given.head, *both,
        jnp.float32(rate),
    )  # fmt: skip
    return jl.merge(c.params, start.replace(trainable=trainable))


def right(params: Any, given: Few, rows: clip.Rows) -> np.ndarray:
    """Whether each picture gets its category, float [n]."""
    apply, said = clip.classifier(clip.base().config), []
    for start in range(0, len(rows.label), clip.AT_ONCE):
        chosen = np.minimum(np.arange(start, start + clip.AT_ONCE), len(rows.label) - 1)
        x = scaled(rows.pixels[chosen])
        said.append(np.asarray(clip._logits(apply, params, x, given.head)))
    return (np.concatenate(said)[: len(rows.label)].argmax(-1) == rows.label).astype(float)


@functools.cache
def best_rate(sizes: Sizes) -> float:
    """The rate of the best mean accuracy of real pictures alone, away from the test pictures."""
    world = pictures.world(base_d.FOLDER, pictures.WEIGHTS)
    score = {}
    for rate in sizes.rates:
        hits = []
        for style in STYLES:
            one = few(world, style, sizes.shots, TUNING)
            params = learned(one, one.shots, one.shots, rate, sizes, TUNING)
            hits.append(right(params, one, one.rest).mean())
        score[rate] = np.mean(hits)
    return max(score, key=score.__getitem__)


def figures(seed: int, world: pictures.World, sizes: Sizes = SIZES) -> Figures:
    """Which test drawings get their category, one seed.

    Args:
      seed: of shots, adapters, names and noise.
      world: base D and its pictures.
      sizes: how much of everything.
    """
    rate, units, more = best_rate(sizes), [], {}
    sides: dict[str, list[float]] = {"system": [], "baseline": [], "control": []}
    own = synthetic(world, None, drawings(STYLES[0])[1], sizes, seed)
    for style in STYLES:
        given = few(world, style, sizes.shots, seed)
        if given.labels != drawings(STYLES[0])[1]:
            raise ValueError(f"{style}: got the categories {given.labels}, expected those of "
                             f"{STYLES[0]}")  # fmt: skip
        dreams = synthetic(world, drawer(world, given, sizes.drawer, seed), given.labels, sizes,
                           seed)  # fmt: skip
        real = given.shots
        fit = functools.partial(learned, given, rate=rate, sizes=sizes, seed=seed)
        weights = {
            "system": fit(real, dreams), "baseline": fit(real, real), "control": fit(real, own),
            "real pictures as they are": fit(real, real, augmented=False),
            "synthetic alone": fit(dreams, dreams), "base C": clip.base().params,
        }  # fmt: skip
        for name, params in weights.items():
            hits = right(params, given, given.test)
            more[f"{style}: {name}: accuracy"] = float(hits.mean())
            if name in sides:
                sides[name] += hits.tolist()
        units += [f"{style}/{k}" for k in range(len(given.test.label))]
        h = pictures.read(world, given.test.pixels)
        for name, rows in (("LoRA", dreams), ("no LoRA", own)):
            more[f"{style}: synthetic, {name}: FID"] = quality.frechet(
                pictures.read(world, rows.pixels), h
            )
            seen = right(weights["baseline"], given, rows)
            more[f"{style}: synthetic, {name}: category seen by the baseline"] = float(seen.mean())
    return Figures(tuple(units), *(tuple(x) for x in sides.values()), more=more | {"rate": rate})


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; nothing is shared by seeds."""
    return figures(seed, pictures.world(base_d.FOLDER, pictures.WEIGHTS))


CLAIM = Claim(
    name="datadream",
    systems=("DataDream",),
    statement=f"accuracy on categories of emoji in new styles from {SIZES.shots} drawings of each: "
    "real and synthetic drawings of an adapted base D > real drawings alone",
    reference="Kim 2024, 2407.10910: real and synthetic shots together beat real shots",
    baseline="real drawings alone, as many steps and pictures, moved and mirrored too",
    control="synthetic pictures of base D without the adapter",
    unit="accuracy",
    assets=("minilm", "emoji_google", "emoji_twitter", "mnist", "fashion_mnist", "openmoji"),
    run=run,
)

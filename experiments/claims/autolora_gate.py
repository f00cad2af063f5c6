r"""AutoLoRA: gates that a few pictures of three styles at once have trained fuse their adapters.

===========  ====================================================================================
A_1 .. A_3   style adapters of base D, each trained on pictures of its style alone, then frozen
x            FEW pictures that have all three styles; gates see nothing else
score        share of the three styles that a drawn picture has, mean over held-out names
===========  ====================================================================================

.. math:: \mathrm{score}(\text{gates trained on } x) > \max\bigl(\mathrm{score}(A_1 + A_2 + A_3),\;
          \mathrm{score}(\tfrac13 (A_1 + A_2 + A_3))\bigr)

Whether a picture has a style is what a logistic regression says, fitted on the features of real
training pictures in all eight subsets of the three. Kept with the record: the scale of the mean
that has the least denoising loss on x; LoRA trained on x for as many steps; the same gates with the
times of the steps shuffled; Fréchet distances; of seed 0, gates without the time.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import picture_styles as styles
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d, data, quality, sampling
from experiments.pictures import train as base_training
from experiments.stages.zoo_training import optimizer
from experiments.styles import distill
from experiments.styles.transforms import transformed
from experiments.styles.zoo_training import velocity
from jlora.compose.gated_fusion import gated
from jlora.generation.baselines import logistic
from jlora.generation.diffusion import guidance, samplers
from jlora.generation.diffusion.loss import Objective, diffusion_loss
from jlora.generation.diffusion.paths import rectified_flow
from jlora.models import dit

Triple = tuple[tuple[str, float], ...]  # families and values, in the order of the transforms
SOURCE = "google"
TRIPLES: tuple[Triple, ...] = (
    (("saturation", 0.0), ("ground", 216.0), ("stripes", 4.0)),
    (("invert", 1.0), ("tint", 120.0), ("pixelate", 6.0)),
)
SCALES = (0.25, 1 / 3, 0.5, 0.75, 1.0, 1.25)  # of the sum
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the loss that a scale is chosen by
OBJECTIVE = Objective(rectified_flow(), "velocity", "logit_normal", drop=0.1)


class Sizes(NamedTuple):
    """How much of everything."""

    styled: distill.Recipe = styles.STYLED  # of each style's adapter
    few: int = 8  # pictures that gates are trained on, all of them in every step
    cosines: int = 3  # of the gates' time
    gate_steps: int = 60
    gate_rate: float = 3e-2  # peak, of Adam
    each: int = 50  # pictures of a measurement
    steps: int = 12  # Euler steps of a picture
    judged: int = 60  # real pictures of each subset of styles


SIZES = Sizes()


class Target(NamedTuple):
    """Three styles at once."""

    name: str
    token: np.ndarray  # int32 [n], the base's style, by which held-out names are asked for
    words: np.ndarray  # int32 [n, k]
    few: np.ndarray  # uint8 [FEW, 32, 32, 3]
    given: dit.Condition  # of the few
    real: np.ndarray  # [m, 64] features of real held-out pictures that have all three
    examples: np.ndarray  # [l, 64] features of training pictures in all subsets
    labels: np.ndarray  # int64 [l, 3], 1: has the style


def dressed(pixels: np.ndarray, triple: Triple, chosen: tuple[int, ...]) -> np.ndarray:
    """Pictures with some styles of a triple: those where `chosen` is 1."""
    for (family, value), there in zip(triple, chosen, strict=True):
        pixels = transformed(pixels, family, value) if there else pixels
    return pixels


def target(world: styles.World, triple: Triple, sizes: Sizes, seed: int) -> Target:
    """What is asked for, and the few pictures of it.

    Args:
      world: base and pictures.
      triple: the styles.
      sizes: how much of everything.
      seed: of the few.
    """
    every, full = world.pictures, (1,) * len(triple)
    own = every.style == every.styles.index(SOURCE) + 1
    held = np.flatnonzero(own & every.held_out)
    rows = np.random.default_rng(0).permutation(held)[: sizes.each]
    known = np.flatnonzero(own & ~every.held_out)
    few = np.random.default_rng([seed, 3]).permutation(known)[: sizes.few]
    judged = np.random.default_rng(1).permutation(known)[: sizes.judged]
    subsets = [*itertools.product((0, 1), repeat=len(triple))]
    examples = [styles.read(world, dressed(every.pixels[judged], triple, s)) for s in subsets]
    return Target(
        ", ".join(f"{family} {value:g}" for family, value in triple),
        every.style[rows], every.words[rows], dressed(every.pixels[few], triple, full),
        base_training.batch(every, few)[1],
        styles.read(world, dressed(every.pixels[held], triple, full)),
        np.concatenate(examples), np.repeat(np.asarray(subsets), len(judged), axis=0),
    )  # fmt: skip


def shares(one: Target, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The share of the three styles that each picture has, [n], by who drew it."""
    every = np.concatenate([*features.values()])
    said = [logistic.scores(one.examples, own, every, styles.PENALTY) for own in one.labels.T]
    share = np.mean([s[:, 1] > s[:, 0] for s in said], axis=0)
    ends = np.cumsum([len(x) for x in features.values()])
    return dict(zip(features, np.split(share, ends[:-1]), strict=True))


@functools.cache
def denoiser(config: dit.DiTConfig) -> Any:
    """((base, gates, clock), z, t, condition, null) -> velocity, as samplers and losses call it.

    The clock says which time the gates read at each of T + 1 times from 0 to 1; None: t.
    """
    tuned = jl.lift(velocity(config))

    def model(params: Any, z: Any, t: Any, condition: Any, null: Any) -> Any:
        base, gates, clock = params
        if clock is not None:
            t_gate = clock[jnp.round(t * (len(clock) - 1)).astype(jnp.int32)]
        else:
            t_gate = t
        return tuned(base, gates, z, t, condition, null, ctx={"time": t_gate}), None

    return model


@functools.cache
def _step(config: dit.DiTConfig, steps: int, rate: float) -> Any:
    model, rule = denoiser(config), optimizer(rate, steps)

    def loss(trainable: Any, base: Any, gates: jl.Adapter, key: Any, x: Any, given: Any) -> Any:
        whole = lambda own, *rest: model((base, gates.replace(trainable=own), None), *rest)  # noqa: E731
        return diffusion_loss(whole, trainable, key, x, given, OBJECTIVE)[0]

    def step(trainable: Any, state: Any, *rest: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trainable, *rest)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = rule.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return jax.jit(step)


def fused(
    world: styles.World, adapters: list[jl.Adapter], one: Target, sizes: Sizes, seed: int,
    cosines: int,
) -> tuple[jl.Adapter, float]:  # fmt: skip
    """Trained gates around frozen adapters, and the mean loss of the last tenth of the steps.

    Args:
      world: base and pictures.
      adapters: of the styles.
      one: whose few pictures are learned from.
      sizes: how much of everything.
      seed: of gates, times and noise.
      cosines: of the gates' time.
    """
    gates = gated(jax.random.key(seed), adapters, cosines=cosines)
    step = _step(world.base.config, sizes.gate_steps, sizes.gate_rate)
    trainable, losses = gates.trainable, []
    state = optimizer(sizes.gate_rate, sizes.gate_steps).init(trainable)
    for number in range(sizes.gate_steps):
        key = jax.random.fold_in(jax.random.key(seed), number)
        trainable, state, value = step(
            trainable, state, world.base.params, gates, key, data.scaled(one.few), one.given
        )
        losses.append(float(value))
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"{one.name}: the loss of the gates is not finite")
    last = losses[-max(1, len(losses) // 10) :]
    return gates.replace(trainable=trainable), float(np.mean(last))


@functools.cache
def _sampler(config: dit.DiTConfig, steps: int) -> Any:
    form, plan = guidance.guided(denoiser(config)), samplers.Sampler("euler", steps)
    return samplers.build(form, rectified_flow(), "velocity", (32, 32, 3), plan)


def drawn(
    world: styles.World, gates: jl.Adapter, one: Target, sizes: Sizes, seed: int,
    clock: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Features of pictures that gates have drawn, [n, 64].

    Args:
      world: base and pictures.
      gates: around the adapters.
      one: what is asked for.
      sizes: how much of everything.
      seed: of the noise.
      clock: float32 [steps + 1], the time that gates read at each time from 0 to 1.
    """
    run, kept = _sampler(world.base.config, sizes.steps), []
    size = min(sampling.AT_ONCE, len(one.token))
    for start in range(0, len(one.token), size):
        rows = np.minimum(np.arange(start, start + size), len(one.token) - 1)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
        given = dit.Condition(jnp.asarray(one.token[rows]), jnp.asarray(one.words[rows]))
        params = world.base.params, gates, jnp.asarray(clock)
        kept.append(np.asarray(run(params, keys, given, np.float32(styles.GUIDANCE))))
    return styles.read(world, data.bytes_of(np.concatenate(kept)[: len(one.token)]))


def plain(
    world: styles.World, adapter: jl.Adapter, one: Target, sizes: Sizes, seed: int
) -> np.ndarray:
    """Features of pictures that one merged adapter has drawn; arguments as of `drawn`."""
    params = jl.merge(world.base.params, adapter)
    pixels = sampling.sample(
        params, world.base.config, one.token, one.words, sizes.steps, styles.GUIDANCE, seed
    )  # fmt: skip
    return styles.read(world, pixels)


@functools.cache
def _losses(config: dit.DiTConfig) -> Any:
    def one(params: Any, x: Any, given: Any, t: Any, noise: Any) -> Any:
        value = dit.forward(params, (1.0 - t) * x + t * noise, t, given, config=config).velocity
        return jnp.mean((value - (noise - x)) ** 2)

    return jax.jit(lambda params, *rows: jnp.mean(jax.vmap(functools.partial(one, params))(*rows)))


def best_scale(world: styles.World, adapters: list[jl.Adapter], one: Target) -> float:
    """The scale of the sum with the least loss on the few pictures, at fixed times and noise."""
    x = np.concatenate([data.scaled(one.few)] * len(TIMES))
    given = jax.tree.map(lambda v: jnp.concatenate([v] * len(TIMES)), one.given)
    t = np.repeat(np.asarray(TIMES, np.float32), len(one.few))
    noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    run = _losses(world.base.config)
    loss = {s: float(run(jl.merge(world.base.params, summed(adapters, s)), x, given, t, noise))
            for s in SCALES}  # fmt: skip
    return min(loss, key=loss.__getitem__)


def summed(adapters: list[jl.Adapter], scale: float) -> jl.Adapter:
    """The sum of adapters, times a number, as one adapter."""
    return jl.merging.merge("concat", adapters, jnp.full(len(adapters), scale))


def direct(world: styles.World, one: Target, sizes: Sizes, seed: int) -> jl.Adapter:
    """LoRA trained on the few pictures, for as many steps as the gates."""
    recipe = sizes.styled._replace(steps=sizes.gate_steps)
    rows = data.scaled(one.few), one.given
    return distill.train(world.base, recipe, lambda _: rows, seed)[0]


def figures(seed: int, world: styles.World, sizes: Sizes = SIZES) -> Figures:
    """Shares of styles of one seed, per drawn picture.

    Args:
      seed: of adapters, few pictures, gates and noise.
      world: base and pictures.
      sizes: how much of everything.
    """
    targets = [target(world, triple, sizes, seed) for triple in TRIPLES]
    clock = np.linspace(0, 1, sizes.steps + 1, dtype=np.float32)
    mixed = np.random.default_rng([seed, 9]).permutation(clock)
    sides: dict[str, list[float]] = {"system": [], "baseline": [], "control": []}
    units, more = [], {}
    for number, (triple, one) in enumerate(zip(TRIPLES, targets, strict=True)):
        adapters = [styles.styled(world, SOURCE, *style, sizes.styled, seed) for style in triple]
        ways = [("gates", one, sizes.cosines),
                ("gates of other styles", targets[number - 1], sizes.cosines),
                *[("gates without time", one, 0)] * (seed == 0)]  # fmt: skip
        h: dict[str, np.ndarray] = {}
        for name, learned, cosines in ways:
            gates, loss = fused(world, adapters, learned, sizes, seed, cosines)
            h[name] = drawn(world, gates, one, sizes, seed, clock)
            more[f"{one.name}: {name}: loss on the few pictures"] = loss
            if name == "gates":
                h["gates, times shuffled"] = drawn(world, gates, one, sizes, seed, mixed)
        scale = best_scale(world, adapters, one)
        more[f"{one.name}: best scale of the sum"] = scale
        for name, adapter in (
            ("sum", summed(adapters, 1.0)), ("mean", summed(adapters, 1 / len(adapters))),
            ("best scale", summed(adapters, scale)), ("LoRA", direct(world, one, sizes, seed)),
        ):  # fmt: skip
            h[name] = plain(world, adapter, one, sizes, seed)
        h["real pictures"] = one.real
        has = shares(one, h)
        rival = max(("sum", "mean"), key=lambda name: has[name].mean())
        for side, name in zip(sides, ("gates", rival, "gates of other styles"), strict=True):
            sides[side] += has[name].tolist()
        units += [f"{one.name}/{k}" for k in range(len(one.token))]
        more |= {f"{one.name}: {name}: style score": float(x.mean()) for name, x in has.items()}
        more |= {f"{one.name}: {name}: FID": quality.frechet(x, one.real) for name, x in h.items()
                 if name != "real pictures"}  # fmt: skip
    return Figures(tuple(units), *(tuple(x) for x in sides.values()), more=more)


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; nothing is shared by seeds."""
    return figures(seed, styles.world(base_d.FOLDER, styles.WEIGHTS))


CLAIM = Claim(
    name="autolora_gate",
    systems=("AutoLoRA: gated fusion",),
    statement="share of three styles that drawn pictures have: gates over layers and steps, "
    f"trained on {SIZES.few} pictures that have all three > the better of sum and mean of the "
    "three styles' adapters",
    reference="2025, 2508.02107, abstract: gates across layers and steps fuse several adapters",
    baseline="the sum or the mean of the adapters, whichever scores higher",
    control="gates around the same adapters, trained on pictures of three other styles",
    unit="share of the three styles, per picture",
    assets=("emoji_google", "emoji_twitter", "mnist", "fashion_mnist"),
    run=run,
)

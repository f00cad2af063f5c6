r"""DiffuseKronA on base D: styles whose quality depends less on the learning rate than LoRA's.

==========  ======================================================================================
E           five learning rates: 1/9, 1/3, 1, 3 and 9 times the one that is best with a seed of its
            own, per method
F(e)        Fréchet distance of pictures of a style drawn after training at rate e
u           style that base D does not know
x_su        mean over E of F(e) minus the lowest, Kronecker adapters with 35 % fewer numbers
y_su        the same of LoRA
z_su        control: the same of Kronecker adapters of the other style, minus the lowest of x
==========  ======================================================================================

.. math:: x_{su} < y_{su}

Both adapt the attention kernels for as many steps on the same pictures. Whole factors, scale 1, as
the official code. Recorded too: distances at every rate, and the range of the five.
Deviates: styles, not subjects: base D draws a subject by its name.
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
from experiments.claims import picture_styles as styles
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d, data, quality, sampling
from experiments.pictures import train as base_training
from experiments.styles.transforms import transformed
from experiments.styles.zoo_training import fresh, velocity
from jlora.core.method import Method
from jlora.generation.diffusion.loss import Objective, diffusion_loss
from jlora.generation.diffusion.paths import rectified_flow
from jlora.methods import LoKr
from jlora.models import dit

SITES = r"blocks/attention/(query|key|value|out)/kernel"
METHODS: dict[str, Method] = {
    "DiffuseKronA": LoKr(rank=32, alpha=32.0, sizes=(4, 8)),  # 160 = 4 x 40 = 8 x 20, both whole
    "LoRA": jl.LoRA(4, alpha=4.0),
}
STYLES = (("google", "invert", 1.0), ("google", "ground", 216.0))  # source, family, value
TUNING = 1000  # the seed that middle rates are chosen with
GRID = (3e-4, 1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2)
SPREAD = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)


class Sizes(NamedTuple):
    """How much of everything."""

    steps: int = 50
    batch: int = 8
    each: int = 40  # pictures per measurement
    drawn: int = 12  # steps of Euler's method


SIZES = Sizes()
OBJECTIVE = Objective(rectified_flow(), "velocity", "logit_normal", drop=0.1)


@functools.cache
def _step(config: dit.DiTConfig) -> Any:
    tuned = jl.lift(velocity(config))
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def step(trainable: Any, state: Any, params: Any, adapter: jl.Adapter, key: Any, x: Any,
             condition: Any, rate: Any) -> Any:  # fmt: skip
        def model(own: Any, z: Any, t: Any, one: Any, null: Any) -> Any:
            return tuned(params, adapter.replace(trainable=own), z, t, one, null), None

        loss = lambda own: diffusion_loss(model, own, key, x, condition, OBJECTIVE)[0]  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = rule.update(jax.grad(loss)(trainable), state)
        return jax.tree.map(lambda p, u: p - rate * u, trainable, updates), state

    return rule, jax.jit(step)


def trained(
    world: styles.World, name: str, style: tuple[str, str, float], rate: float, sizes: Sizes,
    seed: int,
) -> jl.Adapter:  # fmt: skip
    """An adapter of a style.

    Args:
      world: base and pictures.
      name: key of `METHODS`.
      style: source, family, value.
      rate: of the first step; it falls to zero linearly.
      sizes: steps and pictures per step.
      seed: of the start, the pictures, times and noise.
    """
    source, family, value = style
    token = world.pictures.styles.index(source) + 1
    own = np.flatnonzero((world.pictures.style == token) & ~world.pictures.held_out)
    pixels = transformed(world.pictures.pixels[own], family, value)
    method: Any = METHODS[name]
    longest = world.base.names["longest_name"]
    adapter = fresh(world.base.config, longest, SITES, method, seed)
    rule, step = _step(world.base.config)
    trainable, state = adapter.trainable, rule.init(adapter.trainable)
    for number in range(sizes.steps):
        rows = np.random.default_rng([seed, number]).integers(0, len(own), sizes.batch)
        condition = base_training.batch(world.pictures, own[rows])[1]
        key = jax.random.fold_in(jax.random.key(seed), number)
        now = jnp.float32(rate * (1 - number / sizes.steps))
        trainable, state = step(trainable, state, world.base.params, adapter, key,
                                data.scaled(pixels[rows]), condition, now)  # fmt: skip
    return adapter.replace(trainable=trainable)


def distance(
    world: styles.World, adapter: jl.Adapter | None, one: styles.Asked, sizes: Sizes, seed: int
) -> float:
    """Fréchet distance of drawn pictures to real held-out ones of a style."""
    base = world.base
    params = base.params if adapter is None else jl.merge(base.params, adapter)
    pixels = sampling.sample(
        params, base.config, one.token, one.words, sizes.drawn, styles.GUIDANCE, seed
    )
    return quality.frechet(styles.read(world, pixels), one.real)


def middle(world: styles.World, name: str, targets: list[styles.Asked], sizes: Sizes) -> float:
    """The rate of the lowest mean distance over styles."""

    def mean(rate: float) -> float:
        got = [distance(world, trained(world, name, style, rate, sizes, TUNING), one, sizes, TUNING)
               for style, one in zip(STYLES, targets, strict=True)]  # fmt: skip
        return float(np.nan_to_num(np.mean(got), nan=np.inf))

    return min(GRID, key=mean)


def numbers(world: styles.World, name: str) -> int:
    """Trained numbers of a method."""
    method: Any = METHODS[name]
    adapter = fresh(world.base.config, world.base.names["longest_name"], SITES, method, 0)
    return sum(x.size for x in jax.tree.leaves(adapter.trainable))


def rates_of(world: styles.World, sizes: Sizes = SIZES) -> dict[str, list[float]]:
    """The five rates of each method."""
    targets = [styles.asked(world, *style, sizes.each) for style in STYLES]
    return {n: [middle(world, n, targets, sizes) * f for f in SPREAD] for n in METHODS}


@functools.cache
def chosen(folder: Path, weights: str) -> dict[str, list[float]]:
    """`rates_of` a base, the same for all seeds."""
    return rates_of(styles.world(folder, weights))


def figures(
    seed: int, world: styles.World, at: dict[str, list[float]], sizes: Sizes = SIZES
) -> Figures:
    """What a rate that was not tuned costs, one seed.

    Args:
      seed: of adapters and noise.
      world: base and pictures.
      at: the rates of each method.
      sizes: how much of everything.
    """
    targets = [styles.asked(world, *style, sizes.each) for style in STYLES]
    every = {name: [[trained(world, name, style, rate, sizes, seed) for rate in at[name]]
                    for style in STYLES] for name in METHODS}  # fmt: skip
    far = {
        name: np.asarray([[distance(world, a, one, sizes, seed) for a in own]
                          for own, one in zip(lanes, targets, strict=True)])
        for name, lanes in every.items()
    }  # fmt: skip
    others = np.asarray([[distance(world, a, one, sizes, seed) for a in own] for own, one in
                         zip(every["DiffuseKronA"][::-1], targets, strict=True)])  # fmt: skip
    excess = {name: x.mean(1) - x.min(1) for name, x in far.items()}
    control = others.mean(1) - far["DiffuseKronA"].min(1)
    more: dict[str, float] = {}
    for name, values in far.items():
        more |= {f"{name}: trained numbers": numbers(world, name), f"{name}: rate": at[name][2]}
        for one, row in zip(targets, values, strict=True):
            more |= {f"{name}, {one.name}, rate x {f:.2g}": float(v)
                     for f, v in zip(SPREAD, row, strict=True)}  # fmt: skip
            more[f"{name}, {one.name}: range"] = float(np.ptp(row))
    for one in targets:
        more[f"base D, {one.name}"] = distance(world, None, one, sizes, seed)
    sides = (excess["DiffuseKronA"], excess["LoRA"], control)
    return Figures(tuple(t.name for t in targets), *(tuple(x.tolist()) for x in sides), more=more)


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; the middle rates are chosen once."""
    world = styles.world(base_d.FOLDER, styles.WEIGHTS)
    return figures(seed, world, chosen(base_d.FOLDER, styles.WEIGHTS))


CLAIM = Claim(
    name="diffuse_krona",
    systems=("LoKr",),
    statement="mean Fréchet distance over five learning rates minus the lowest, of styles of base "
    "D: whole Kronecker factors with 35 % fewer numbers < LoRA of rank 4",
    reference="Marjit 2024, 2402.17412: more stable over learning rates than LoRA",
    baseline="LoRA of rank 4 on the same kernels",
    control="the adapters of the other style",
    unit="Fréchet distance above the lowest, per style",
    assets=("emoji_google", "emoji_twitter", "mnist", "fashion_mnist"),
    run=run,
    less_is_better=True,
)

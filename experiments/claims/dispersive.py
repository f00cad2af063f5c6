r"""Dispersive Loss on a pixel DiT of emoji and digits: Fréchet distances with and without it.

==========  ======================================================================================
L           flow loss of a small DiT on pictures of 32 x 32, asked by style and name
D           dispersive loss (`infonce_l2`, temperature 0.5) of the tokens after block depth / 4
u           style and label, with pictures of names that were not trained on
x_su        Fréchet distance of pictures drawn from the DiT trained on L + 0.5 D, seed s
y_su        the same, trained on L alone
z_su        control: trained on L - 0.5 D, which pulls the tokens of a batch together
==========  ======================================================================================

.. math:: x_{su} < y_{su}

All three have the same start, pictures, times and noises, and draw from the same noise. Distances
are in the features of a small classifier trained on the same pictures, to real pictures of the
style and label, so they compare with one another alone. The record also has the flow loss of
held-out pictures, the effective rank of the tokens, and the distances at the weights 0.25 and 1.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims.protocol import Claim, Figures
from experiments.pictures import classifier, data, quality, sampling, sources
from experiments.pictures.settings import Settings
from experiments.pictures.train import rows
from jlora.generation.diffusion.dispersive import dispersive_loss, effective_rank
from jlora.models import dit

STYLES = ("google", "twitter", "mnist")
KIND, WEIGHT, OTHERS = "infonce_l2", 0.5, (0.25, 1.0)  # the paper's default, and its neighbours
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the held-out loss
MEASURED = 200  # held-out pictures of the loss
LEAST = 8  # real pictures of a unit


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is done."""

    width: int = 64
    depth: int = 4
    patch: int = 4
    steps: int = 1500
    batch: int = 32
    rate: float = 2e-3  # of Adam, falling to zero
    samples: int = 24  # per unit
    sample_steps: int = 20
    guidance: float = 1.5
    classifier_steps: int = 1000
    others: tuple[float, ...] = OTHERS


class World(NamedTuple):
    """Pictures, what is measured, and the classifier."""

    pictures: data.Pictures
    units: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (rows asked for, real rows)
    judge: Any  # parameters


@functools.cache
def world(sizes: Sizes, workdir: Path) -> World:
    """Pictures of the pinned packages, with the classifier kept in the workdir."""
    found = data.gathered(sources.pictures(STYLES), STYLES)
    workdir.mkdir(parents=True, exist_ok=True)
    about = Settings(classifier_steps=sizes.classifier_steps, batch=64)
    return World(
        found, units(found, sizes.samples), classifier.train(found, about, workdir, workdir)
    )


def units(found: data.Pictures, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per style and label the held-out rows whose names are asked for, and all real rows.

    Args:
      found: the pictures.
      count: asked for; names are repeated where fewer are held out.
    """
    out = {}
    for n, style in enumerate(found.styles, 1):
        for k, label in enumerate(found.labels):
            own = (found.style == n) & (found.label == k)
            asked, real = np.flatnonzero(own & found.held_out), np.flatnonzero(own)
            if len(asked) and len(real) >= LEAST:
                out[f"{style}/{label}"] = (np.resize(asked, count), real)
    return out


def parts(params: Any, key: Any, x: Any, condition: Any, config: dit.DiTConfig) -> tuple[Any, Any]:
    """Flow loss of a batch, and the tokens after block depth / 4.

    Args:
      params: of the DiT.
      key: of times, noise and dropped conditions.
      x: pictures in -1 .. 1.
      condition: of each.
      config: the architecture.
    """
    at, noisy, dropped = jax.random.split(key, 3)
    t = jax.nn.sigmoid(jax.random.normal(at, (len(x),)))
    noise = jax.random.normal(noisy, x.shape)
    null = jax.random.bernoulli(dropped, 0.1, (len(x),))

    def one(x: Any, noise: Any, t: Any, condition: Any, null: Any) -> Any:
        z = (1.0 - t) * x + t * noise
        out = dit.forward(params, z, t, condition, null, config=config, features=True)
        assert out.features is not None
        loss = jnp.mean((out.velocity - (noise - x)) ** 2)
        return loss, out.features[max(config.depth // 4, 1) - 1]

    losses, tokens = jax.vmap(one)(x, noise, t, condition, null)
    return losses.mean(), tokens


@functools.cache
def _step(config: dit.DiTConfig) -> Any:
    """A step; the weight is an argument, so that one compilation serves all."""

    def step(params: Any, state: Any, x: Any, condition: Any, key: Any, rate: Any, weight: Any):
        def value(params: Any) -> Any:
            loss, tokens = parts(params, key, x, condition, config)
            return loss + weight * dispersive_loss(KIND, tokens), tokens

        (_, tokens), grads = jax.value_and_grad(value, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, state, effective_rank(tokens)

    return jax.jit(step, donate_argnums=(0, 1))


def architecture(sizes: Sizes, found: data.Pictures) -> dit.DiTConfig:
    """The DiT."""
    return dit.DiTConfig(
        len(found.styles), len(found.vocabulary) + 2, sizes.patch, width=sizes.width,
        depth=sizes.depth, heads=4, ffn=3 * sizes.width, rank=sizes.width // 4,
    )  # fmt: skip


def trained(sizes: Sizes, at: World, weight: float, seed: int) -> tuple[Any, float]:
    """Parameters after training, and the effective rank of the last step's tokens."""
    found, config = at.pictures, architecture(sizes, at.pictures)
    params = dit.init(jax.random.key(seed), config)
    state, step, rank = optax.scale_by_adam().init(params), _step(config), np.nan
    drawn = Settings(batch=sizes.batch, seed=seed)
    for number in range(sizes.steps):
        chosen = rows(found, drawn, number)
        rate = sizes.rate * min(1.0, (number + 1) / 50) * (1 - number / sizes.steps)
        params, state, rank = step(
            params, state, data.scaled(found.pixels[chosen]), conditions(found, chosen),
            jax.random.fold_in(jax.random.key(seed), number), np.float32(rate), np.float32(weight),
        )  # fmt: skip
    return params, float(rank)


def conditions(found: data.Pictures, chosen: np.ndarray) -> dit.Condition:
    """Styles and names of some pictures."""
    return dit.Condition(jnp.asarray(found.style[chosen]), jnp.asarray(found.words[chosen]))


def distances(sizes: Sizes, at: World, params: Any, seed: int) -> list[float]:
    """Fréchet distance of each unit."""
    found, config = at.pictures, architecture(sizes, at.pictures)
    asked = np.concatenate([own for own, _ in at.units.values()])
    drawn = sampling.sample(
        params, config, found.style[asked], found.words[asked], sizes.sample_steps,
        sizes.guidance, seed,
    )  # fmt: skip
    read = functools.partial(classifier.apply, found, at.judge)
    mine = read(drawn)[0].reshape(len(at.units), sizes.samples, -1)
    return [
        quality.frechet(own, read(found.pixels[real])[0])
        for own, (_, real) in zip(mine, at.units.values(), strict=True)
    ]


def held_out(sizes: Sizes, at: World, params: Any) -> float:
    """Flow loss of held-out pictures at fixed times and noise."""
    found, config = at.pictures, architecture(sizes, at.pictures)
    chosen = np.resize(quality.balanced(found, found.measured, MEASURED, 0), MEASURED)
    x = data.scaled(found.pixels[chosen])
    noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    t = np.resize(np.asarray(TIMES, np.float32), len(x))

    @jax.jit
    def losses(params: Any, x: Any, noise: Any, t: Any, condition: Any) -> Any:
        def one(x: Any, noise: Any, t: Any, condition: Any) -> Any:
            out = dit.forward(params, (1.0 - t) * x + t * noise, t, condition, config=config)
            return jnp.mean((out.velocity - (noise - x)) ** 2)

        return jax.vmap(one)(x, noise, t, condition)

    return float(losses(params, x, noise, t, conditions(found, chosen)).mean())


def figures(sizes: Sizes, seed: int, workdir: Path) -> Figures:
    """Fréchet distances per style and label, one seed.

    Args:
      sizes: how much is done.
      seed: of start, pictures, times and noises.
      workdir: where the classifier is kept.
    """
    at, more, far = world(sizes, workdir), {}, {}
    for weight in (WEIGHT, 0.0, -WEIGHT, *sizes.others):
        params, rank = trained(sizes, at, weight, seed)
        far[weight] = distances(sizes, at, params, seed)
        more |= {f"weight {weight}: Fréchet distance": float(np.mean(far[weight])),
                 f"weight {weight}: held-out flow loss": held_out(sizes, at, params),
                 f"weight {weight}: effective rank": rank}  # fmt: skip
    values = (tuple(far[w]) for w in (WEIGHT, 0.0, -WEIGHT))
    return Figures(tuple(at.units), *values, more=more)


CLAIM = Claim(
    name="dispersive",
    systems=("Dispersive loss",),
    statement="Fréchet distance per style and label after 1500 steps from nothing: DiT with 0.5"
    " times the dispersive loss < the same DiT without",
    reference="Wang 2025, 2506.09027: lower FID of DiT and SiT on ImageNet with the loss",
    baseline="the same DiT trained on the flow loss alone",
    control="the weight of the dispersive loss with its sign flipped",
    unit="Fréchet distance",
    assets=("emoji_google", "emoji_twitter", "mnist"),
    run=functools.partial(figures, Sizes()),
    less_is_better=True,
)

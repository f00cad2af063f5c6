"""FiTv2's AdaLN-LoRA: the loss of adaLN with about half of the numbers in the modulation.

Both are small DiTs trained from nothing on pictures of 16 x 16 and 24 x 24 pixels in turn, by the
rectified flow with times of the logit-normal law. Measured is the loss of held-out pictures at
fixed times and noises, per style, label and size; rectangles of 16 x 24 are measured too, though
neither was trained on them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from experiments.claims.protocol import Claim, Figures
from experiments.pictures import data, sources
from jlora.models import dit
from jlora.models.dit.modulation import size

STYLES = ("google", "twitter", "mnist")
WIDTH, DEPTH, HEADS, RANK = 64, 4, 4, 16  # the rank is a quarter of the width, as in FiTv2's XL
STEPS, BATCH = 400, 32
SIDES = (16, 24)
RATES = (1e-3, 3e-3)  # of Adam; chosen per model by the training loss
TUNING, LAST = 10_000, 50  # seed of the choice; steps whose loss is compared
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the measurement
ROWS = 24  # measured per style and label, at most
MARGIN = 1.02  # the loss may be this many times that of adaLN


class World(NamedTuple):
    """Pictures of each size, and which of them are measured."""

    pictures: data.Pictures
    pixels: dict[tuple[int, int], np.ndarray]  # height, width -> float32 [n, h, w, 3]
    units: tuple[str, ...]  # style and label of each group of measured rows
    rows: np.ndarray  # int64 [n]
    owner: np.ndarray  # int64 [n]: the unit of a row


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bytes [n, 32, 32, 3] as numbers in -1 .. 1, [n, height, width, 3]."""
    kind = Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(p).resize((width, height), kind)) for p in pixels]
    return data.scaled(np.stack(small))


@functools.cache
def world() -> World:
    """Pictures of the pinned packages."""
    found = data.gathered(sources.pictures(STYLES), STYLES)
    kinds: dict[tuple[int, int], list[int]] = {}
    for row in found.measured:
        kinds.setdefault((int(found.style[row]), int(found.label[row])), []).append(int(row))
    kinds = {pair: rows[:ROWS] for pair, rows in sorted(kinds.items())}
    units = tuple(f"{found.styles[s - 1]}/{found.labels[n]}" for s, n in kinds)
    owner = np.repeat(np.arange(len(units)), [len(rows) for rows in kinds.values()])
    shapes = [(side, side) for side in SIDES] + [SIDES]
    pixels = {shape: resized(found.pixels, *shape) for shape in shapes}
    return World(found, pixels, units, np.concatenate([*kinds.values()]), owner)


def config(name: str) -> dit.DiTConfig:
    """The architecture of "adaln" or "adaln_lora"."""
    found = world().pictures
    return dit.DiTConfig(
        len(found.styles), len(found.vocabulary) + 2, width=WIDTH, depth=DEPTH, heads=HEADS,
        ffn=3 * WIDTH, rank=RANK if name == "adaln_lora" else 0,
    )  # fmt: skip


def losses(params: Any, x: Any, noise: Any, t: Any, condition: Any, config: Any) -> Any:
    """Squared error of the velocity per picture, [n]."""

    def one(x: Any, noise: Any, t: Any, condition: Any) -> Any:
        z = (1.0 - t) * x + t * noise
        found = dit.forward(params, z, t, condition, config=config).velocity
        return jnp.mean((found - (noise - x)) ** 2)

    return jax.vmap(one)(x, noise, t, condition)


@functools.cache
def _step(config: dit.DiTConfig) -> Any:
    def step(params: Any, state: Any, x: Any, condition: Any, key: Any, rate: Any) -> Any:
        at, noisy = jax.random.split(key)
        t = jax.nn.sigmoid(jax.random.normal(at, (len(x),)))
        noise = jax.random.normal(noisy, x.shape)
        mean = lambda p: losses(p, x, noise, t, condition, config).mean()  # noqa: E731
        value, grads = jax.value_and_grad(mean)(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


@functools.cache
def trained(name: str, rate: float, seed: int) -> tuple[Any, np.ndarray]:
    """Parameters after training, and the loss of each step."""
    found, own = world(), config(name)
    params = dit.init(jax.random.key(seed), own)
    state, step, kept = optax.scale_by_adam().init(params), _step(own), []
    for number in range(STEPS):
        draw = np.random.default_rng([seed, number])
        rows = draw.choice(found.pictures.train, BATCH)
        side = SIDES[number % len(SIDES)]
        now = rate * min(1.0, (number + 1) / 50) * (1 - number / STEPS)
        params, state, value = step(
            params, state, found.pixels[side, side][rows], conditions(rows),
            jax.random.fold_in(jax.random.key(seed), number), np.float32(now),
        )  # fmt: skip
        kept.append(float(value))
    return params, np.asarray(kept)


def conditions(rows: np.ndarray) -> dit.Condition:
    """Styles and names of some pictures."""
    found = world().pictures
    return dit.Condition(jnp.asarray(found.style[rows]), jnp.asarray(found.words[rows]))


@functools.cache
def best(name: str) -> float:
    """The rate of the lowest training loss."""
    scores = {rate: trained(name, rate, TUNING)[1][-LAST:].mean() for rate in RATES}
    return min(scores, key=lambda rate: float(np.nan_to_num(scores[rate], nan=np.inf)))


@functools.cache
def _measure(config: dit.DiTConfig) -> Any:
    return jax.jit(functools.partial(losses, config=config))


def measured(
    name: str, params: Any, shape: tuple[int, int], seed: int, turned: bool = False
) -> np.ndarray:
    """Loss of each unit at one size; `turned`: time and style are those of another picture."""
    found, draw = world(), np.random.default_rng([seed, *shape])
    x = found.pixels[shape][found.rows]
    noise = draw.normal(size=x.shape).astype(np.float32)
    t = draw.permutation(np.resize(np.asarray(TIMES, np.float32), len(x)))
    other = draw.permutation(len(x)) if turned else np.arange(len(x))
    condition = conditions(found.rows)
    condition = condition._replace(style=condition.style[other])
    run = _measure(config(name))
    if turned:  # the picture has the noise of its own time
        x, noise, t = _mixed(x, noise, t, t[other])
    value = np.asarray(run(params, x, noise, t, condition))
    return np.asarray([value[found.owner == n].mean() for n in range(len(found.units))])


def _mixed(
    x: np.ndarray, noise: np.ndarray, t: np.ndarray, said: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture and noise whose mixture at `said` is that of x and noise at t, same velocity."""
    wide = (t - said)[:, None, None, None]
    velocity = noise - x
    return x + wide * velocity, noise + wide * velocity, said


def run(seed: int, workdir: Any) -> Figures:
    """Loss per style, label and size, one seed."""
    found = world()
    names = ("adaln_lora", "adaln")
    params = {name: trained(name, best(name), seed)[0] for name in names}
    loss: dict[str, list[float]] = {"adaln_lora": [], "adaln": [], "control": []}
    units, more = [], {}
    for shape in found.pixels:
        said = f"{shape[0]}x{shape[1]}"
        value = {name: measured(name, params[name], shape, seed) for name in names}
        value["control"] = measured("adaln_lora", params["adaln_lora"], shape, seed, turned=True)
        more |= {f"{name}, {said}: loss": float(x.mean()) for name, x in value.items()}
        if shape[0] == shape[1]:
            units += [f"{unit}, {said}" for unit in found.units]
            for name, x in value.items():
                loss[name] += x.tolist()
    more |= {f"{name}: rate": best(name) for name in names}
    for name in names:
        numbers = sum(x.size for x in jax.tree.leaves(params[name]))
        held = size(WIDTH, DEPTH, config(name).rank)
        more[f"{name}: numbers"] = float(numbers)
        more[f"{name}: numbers of the modulation"] = float(held)
    more["share of the modulation"] = size(WIDTH, DEPTH, RANK) / size(WIDTH, DEPTH, 0)
    baseline = tuple(MARGIN * x for x in loss["adaln"])
    return Figures(
        tuple(units), tuple(loss["adaln_lora"]), baseline, tuple(loss["control"]), more=more
    )


CLAIM = Claim(
    name="fitv2_adaln_lora",
    systems=("FiTv2 AdaLN-LoRA",),
    statement=f"held-out flow loss at {SIDES[0]} and {SIDES[1]} pixels after {STEPS} steps from "
    f"nothing: AdaLN-LoRA of rank {RANK} < {MARGIN} times adaLN, with at most 60 % of the numbers "
    "in the modulation",
    reference="Wang 2024, 2410.13925: AdaLN-LoRA keeps the quality of adaLN with fewer parameters",
    baseline=f"{MARGIN} times the loss of the same DiT with a modulation matrix per block",
    control="time and style that the modulation is given are those of another picture",
    unit="loss",
    assets=("emoji_google", "emoji_twitter", "mnist"),
    run=run,
    less_is_better=True,
)

r"""A style as numbers: what base D's own classifier sees in a few pictures of it.

.. math::
    \phi(x) = \big[ h(x);\ m_l(x);\ s_l(x) \big]_{l = 1 \ldots 4}, \qquad
    c = \Big[ \overline{\phi(x_k)};\ \operatorname{sd}_k \phi(x_k) \Big]

Symbols: h the classifier's 64 features, m and s mean and deviation over places of each channel
after the norm of layer l (statistics of feature maps, which follow colour and texture more than
content), :math:`x_1 \ldots x_K` the pictures. Numbers are divided by their deviation over pictures
of seen styles. The classifier was trained on the base's styles alone; nothing of it is trained
here.

Reference: statistics of feature maps as style, Huang and Belongie 2017 (arXiv:1703.06868).
"""

from __future__ import annotations

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pictures import classifier
from experiments.pictures.data import scaled
from experiments.styles.pictures import World

AT_ONCE = 256  # pictures of one call
QUERY = "query"  # the draw that a style is asked by


@functools.cache
def _network(styles: int, labels: int) -> Any:
    network = classifier.Classifier(styles, labels)

    def one(params: Any, x: jax.Array) -> jax.Array:
        (h, _, _), seen = network.apply(
            {"params": params}, x, capture_intermediates=True, mutable=["intermediates"]
        )  # pyright: ignore[reportGeneralTypeIssues]
        maps = [seen["intermediates"][f"norm_{n}"]["__call__"][0]
                for n in range(len(classifier.CHANNELS))]  # fmt: skip
        statistics = [f((1, 2)) for m in maps for f in (m.mean, m.std)]
        return jnp.concatenate([h, *statistics], axis=-1)

    return jax.jit(one)


def features(world: World, pixels: np.ndarray) -> np.ndarray:
    """phi of pictures, float32 [n, F].

    Args:
      world: the base's classifier.
      pixels: uint8 [n, 32, 32, 3].
    """
    run = _network(len(world.known.styles), len(world.known.labels))
    size = min(AT_ONCE, len(pixels))
    kept = []
    for start in range(0, len(pixels), size):
        # the last call is a whole one: one shape is compiled
        rows = np.minimum(np.arange(start, start + size), len(pixels) - 1)
        kept.append(np.asarray(run(world.base.classifier, scaled(pixels[rows]))))
    return np.concatenate(kept)[: len(pixels)]


def gathered(features: np.ndarray) -> np.ndarray:
    """Mean and spread over pictures, [K, F] to [2 F]; the spread of one picture is zero."""
    return np.concatenate([features.mean(0), features.std(0)])


class Features(NamedTuple):
    """The features of all training pictures."""

    of: dict[str, np.ndarray]  # by style, [n, F], divided by `size`
    size: np.ndarray  # [F], deviation over pictures of seen styles


def all_features(world: World) -> Features:
    """Features of the training pictures of every style.

    Args:
      world: styles and classifier.
    """
    raw = {style.name: features(world, world.train[style.name].pixels) for style in world.styles}
    seen = np.concatenate([raw[style.name] for style in world.at("seen")])
    size = seen.std(0)
    size = np.where(size > 1e-6, size, np.ones_like(size))
    return Features({name: x / size for name, x in raw.items()}, size)


def rows(world: World, style: str, draw: str) -> np.ndarray:
    """Which pictures a condition is made of, int64 [shots], each at most once.

    Args:
      world: pictures and settings.
      style: whose.
      draw: its name; another draw has other pictures.
    """
    count, shots = len(world.train[style].label), world.settings.shots
    number = zlib.crc32(f"{world.settings.seed}/{style}/{draw}".encode())
    return np.random.default_rng(number).permutation(count)[:shots]


def condition(world: World, features: Features, style: str, draw: str = QUERY) -> np.ndarray:
    """c of a style, [2 F].

    Args:
      world: pictures and settings.
      features: of `all_features`.
      style: whose.
      draw: of `rows`.
    """
    return gathered(features.of[style][rows(world, style, draw)])

r"""How good base C is: zero-shot accuracies on names never seen, and rivals that train no network.

A picture is given the text of the highest logit among those of all held-out names of its style.

.. math::
    W = \arg\min_W \sum_i \|W^\top (f_i - \bar f) - (e_i - \bar e)\|^2 + \rho \|W\|^2, \qquad
    \text{score}(x, e) = \cos(W^\top (f(x) - \bar f), e - \bar e)

is the rival: a ridge regression from features f of training pictures to the embeddings e of their
names, with :math:`\rho` = RIDGE times the summed variance of each feature, on average. Its features
are those of a ViT with random weights, or the mean colours of 8 x 8 squares.

Reference: Romera-Paredes and Torr 2015 (ESZSL), of the same idea. Deviates: no term for classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.clip import model
from experiments.clip.data import Pairs
from experiments.pictures.data import scaled
from jlora.models.vit import Vit, VitConfig

AT_ONCE = 128  # pictures of one call
RIDGE = 0.1
SQUARES = 8  # colours each way
TOP = (1, 5)


@functools.partial(jax.jit, static_argnums=0)
def _embedded(config: model.ClipConfig, params: Any, x: jax.Array) -> jax.Array:
    return model.images(config, params, x)


@functools.partial(jax.jit, static_argnums=0)
def _states(config: VitConfig, params: Any, x: jax.Array) -> jax.Array:
    return jnp.asarray(Vit(config).apply({"params": params}, x)).mean(1)


def _grouped(run: Any, pixels: np.ndarray) -> np.ndarray:
    """`run` over pictures in groups of one size, so that one compilation serves all."""
    out, size = [], min(AT_ONCE, len(pixels))
    for start in range(0, len(pixels), size):
        chosen = np.minimum(np.arange(start, start + size), len(pixels) - 1)
        out.append(np.asarray(run(scaled(pixels[chosen]))))
    return np.concatenate(out)[: len(pixels)]


def embedded(config: model.ClipConfig, params: Any, pixels: np.ndarray) -> np.ndarray:
    """u of pictures, [n, joint].

    Args:
      config: of the CLIP.
      params: its parameters.
      pixels: uint8 [n, 32, 32, 3].
    """
    return _grouped(functools.partial(_embedded, config, params), pixels)


def random_features(config: VitConfig, pixels: np.ndarray, seed: int) -> np.ndarray:
    """Mean states [n, width] of a ViT with random weights.

    Args:
      config: its architecture.
      pixels: uint8 [n, 32, 32, 3].
      seed: of the weights.
    """
    sample = jnp.zeros((1, config.side, config.side, config.channels))
    params = jax.jit(Vit(config).init)(jax.random.key(seed), sample)["params"]
    return _grouped(functools.partial(_states, config, params), pixels)


def colours(pixels: np.ndarray) -> np.ndarray:
    """Mean colours of 8 x 8 squares, [n, 192]."""
    n, side = len(pixels), pixels.shape[1]
    each = side // SQUARES
    cut = scaled(pixels).reshape(n, SQUARES, each, SQUARES, each, 3)
    return cut.mean((2, 4)).reshape(n, -1)


def ridge(features: np.ndarray, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Predicted directions of all pictures [n, text], and centred texts [names + labels, text].

    Args:
      features: [n, d] of all pictures of `found`; those of training rows are learned from.
      pairs: the pictures and their texts.
    """
    rows = pairs.train
    wanted = pairs.embeddings[pairs.name[rows]].astype(np.float64)
    middle, texts = features[rows].mean(0), wanted.mean(0)
    x = (features - middle).astype(np.float64)
    gram = x[rows].T @ x[rows]
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram, x[rows].T @ (wanted - texts))
    return x @ weights, pairs.embeddings - texts


def top(scores: np.ndarray, right: np.ndarray) -> list[float]:
    """Shares of pictures whose right text is among the 1 and the 5 best.

    Args:
      scores: [n, m].
      right: [n], column of the right text.
    """
    own = scores[np.arange(len(scores)), right]
    better = (scores > own[:, None]).sum(1)
    return [round(float((better < k).mean()), 4) for k in TOP]


def zero_shot(
    u: np.ndarray, v: np.ndarray, pairs: Pairs, rows: np.ndarray, permuted: int | None = None
) -> list[float]:
    """Top-1 and top-5 among the names of some pictures.

    Args:
      u: [n, d] of all pictures.
      v: [names + labels, d] of all texts; the scores are cosines.
      pairs: the pictures.
      rows: those to read; their names are the candidates.
      permuted: seed of a random exchange of the candidates' texts: the control.
    """
    names, right = np.unique(pairs.name[rows], return_inverse=True)
    texts = v[names] / np.linalg.norm(v[names], axis=1, keepdims=True)
    if permuted is not None:
        texts = texts[np.random.default_rng(permuted).permutation(len(names))]
    return top(u[rows] @ texts.T, right)


def figures(
    config: model.ClipConfig, params: Any, pairs: Pairs, seed: int
) -> dict[str, Mapping[str, Any]]:
    """All figures of the card.

    Args:
      config: of the CLIP.
      params: its parameters.
      pairs: the pictures.
      seed: of the random ViT and of the exchanged texts.
    """
    u = embedded(config, params, pairs.pixels)
    v = np.asarray(model.texts(params, jnp.asarray(pairs.embeddings)))
    drawn = ridge(random_features(config.vit, pairs.pixels, seed), pairs)
    plain = ridge(colours(pairs.pixels), pairs)
    names: dict[str, Any] = {}
    for n, style in enumerate(pairs.styles):
        rows = pairs.measured[pairs.style[pairs.measured] == n]
        count = len(np.unique(pairs.name[rows]))
        names[style] = {
            "pictures": len(rows), "names": count,
            "base C": zero_shot(u, v, pairs, rows),
            "ridge on a random ViT": zero_shot(*drawn, pairs, rows),
            "ridge on colours": zero_shot(*plain, pairs, rows),
            "base C, texts exchanged": zero_shot(u, v, pairs, rows, seed),
            "chance": [round(min(1.0, k / count), 4) for k in TOP],
        }  # fmt: skip
    categories = {}
    label = v[len(pairs.names) :]
    label = label / np.linalg.norm(label, axis=1, keepdims=True)
    for name, rows in (("held-out names", pairs.measured), ("training names", pairs.train)):
        share = np.bincount(pairs.label[rows]).max() / len(rows)
        right = top(u[rows] @ label.T, pairs.label[rows])[0]
        categories[name] = {"base C": right, "most frequent": round(float(share), 4)}
    seen = pairs.train[pairs.style[pairs.train] == 0]
    return {"names": names, "categories": categories,
            "training names": {"style": pairs.styles[0], "names": len(np.unique(pairs.name[seen])),
                               "base C": zero_shot(u, v, pairs, seen)}}  # fmt: skip

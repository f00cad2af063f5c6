r"""How good samples are: accuracies, a Fréchet distance, distances to the training pictures.

.. math::
    F(a, b) = \|\mu_a - \mu_b\|^2
        + \operatorname{tr}\bigl(\Sigma_a + \Sigma_b - 2 (\Sigma_a^{1/2} \Sigma_b
        \Sigma_a^{1/2})^{1/2}\bigr), \qquad
    d(x) = \min_j \sqrt{\operatorname{mean}((x - x_j)^2)}

Symbols: :math:`\mu, \Sigma` of the features of our own small classifier, so F is no FID of the
literature and compares with figures of this file alone; d in grey levels of 255, over all pixels
and channels, j the training pictures. Every figure of samples comes with the same figure of real
pictures.

Reference: Heusel et al. 2017 (arXiv:1706.08500) for F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.pictures.data import Pictures

BLOCK = 2048  # training pictures that are compared at once


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """F of two sets of features.

    Args:
      a: [n, d], n > 1.
      b: [m, d], m > 1.

    Raises:
      ValueError: a single row.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"features: got {len(a)} and {len(b)} rows, expected at least 2")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    one, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ second @ root)
    between = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    cross = np.sqrt(np.maximum(both, 0.0)).sum()
    return between + float(np.trace(one) + np.trace(second) - 2.0 * cross)


def nearest(pixels: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """d of pictures, in grey levels.

    Args:
      pixels: uint8 [n, ...].
      bank: uint8 [m, ...].
    """
    x = pixels.reshape(len(pixels), -1).astype(np.float32)
    best = np.full(len(x), np.inf, np.float32)
    for start in range(0, len(bank), BLOCK):
        y = bank[start : start + BLOCK].reshape(-1, x.shape[1]).astype(np.float32)
        square = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2.0 * (x @ y.T)
        best = np.minimum(best, square.min(1))
    return np.sqrt(np.maximum(best, 0.0) / x.shape[1])


def accuracies(
    pictures: Pictures, chosen: np.ndarray, style: np.ndarray, label: np.ndarray
) -> dict[str, Any]:
    """Shares of right styles and labels, of all pictures and per style.

    Args:
      pictures: the pictures.
      chosen: rows whose style and label were asked for.
      style: what the classifier said.
      label: the same.
    """
    right = {"style": style == pictures.style[chosen], "label": label == pictures.label[chosen]}
    out: dict[str, Any] = {name: round(float(x.mean()), 4) for name, x in right.items()}
    for n, name in enumerate(pictures.styles, 1):
        own = pictures.style[chosen] == n
        if own.any():
            out[name] = {k: round(float(x[own].mean()), 4) for k, x in right.items()}
    return out | {"pictures": len(chosen)}


def balanced(pictures: Pictures, among: np.ndarray, count: int, seed: int) -> np.ndarray:
    """About `count` rows, as many of each style, no row twice.

    Args:
      pictures: the pictures.
      among: rows to choose from.
      count: of all styles together.
      seed: of the choice.
    """
    random, each = np.random.default_rng(seed), max(1, count // len(pictures.styles))
    kinds = [among[pictures.style[among] == n + 1] for n in range(len(pictures.styles))]
    return np.concatenate([random.permutation(rows)[:each] for rows in kinds])


def near(samples: np.ndarray, real: np.ndarray, bank: np.ndarray) -> Mapping[str, float]:
    """Whether samples repeat training pictures more than held-out real pictures do.

    Args:
      samples: uint8 [n, ...].
      real: held-out pictures.
      bank: training pictures.
    """
    own, other = nearest(samples, bank), nearest(real, bank)
    limit = float(np.quantile(other, 0.05))
    return {
        "samples: median distance": round(float(np.median(own)), 3),
        "held-out pictures: median distance": round(float(np.median(other)), 3),
        "samples nearer than 95 % of the held-out pictures": round(float((own < limit).mean()), 4),
    }

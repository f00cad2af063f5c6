"""The baselines that a generator has to beat, as canonical tokens.

All are weights over the seen tasks' soups (or a single adapter): mean adapter, nearest-condition
soup, softmax-weighted soup, kernel ridge; the span projection uses the held-out task's own trained
adapter and is an oracle, not a baseline.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages import conditions
from experiments.stages.codec import Encoded
from experiments.stages.denoiser import Trained
from experiments.stages.world import World
from jlora.generation.baselines import nearest, ridge, soup, span

TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Baselines(NamedTuple):
    """Fitted baselines over K seen tasks."""

    soups: np.ndarray  # [K, T, D] canonical tokens of the soups
    conditions: jax.Array  # [K, 2 C E] flat scaled conditions
    kernel: ridge.Kernel  # chosen by leave-one-task-out error of the tokens
    penalty: float  # likewise
    error: float  # that error relative to the mean's
    temperature: float  # of the softmax soup, chosen likewise


def soups_of(encoded: Encoded) -> np.ndarray:
    """[K, T, D] mean tokens of each seen task's training rows (exact in delta space where A is
    shared; the factor mean of canonical forms otherwise)."""
    weights = soup.task_weights(jnp.asarray(encoded.task), len(encoded.names))
    return np.asarray(soup.combine(weights, jnp.asarray(encoded.x)))


def fit(world: World, encoded: Encoded, trained: Trained) -> Baselines:
    """Choose kernel, penalty and temperature on the training tasks alone."""
    soups = soups_of(encoded)
    raw = jnp.asarray(conditions.canonical(world, encoded.names))
    cond = conditions.scaled(trained.fixed.stats, raw).reshape(len(raw), -1)
    flat = jnp.asarray(soups.reshape(len(soups), -1))
    flat = flat - flat.mean(0)[None]
    gram = flat @ flat.T
    groups = jnp.arange(len(soups))
    choice = ridge.choose(cond, gram, groups)
    alike = nearest.similarity(cond, cond)
    temperature, _ = nearest.choose_temperature(alike, gram, groups, TEMPERATURES)
    return Baselines(soups, cond, choice.kernel, choice.penalty, choice.error, float(temperature))


def predict(fitted: Baselines, cond: jax.Array) -> dict[str, np.ndarray]:
    """{method: tokens [T, D]} for one scaled condition [2 C, E]."""
    query = cond.reshape(1, -1)
    alike = nearest.similarity(query, fitted.conditions)
    state = ridge.fit(fitted.kernel, fitted.conditions, fitted.penalty)
    weights = {
        "mean_adapter": soup.mean_weights(len(fitted.soups)),
        "nearest": nearest.nearest(alike),
        "softmax": nearest.softmax(alike, fitted.temperature),
        "ridge": ridge.weights(fitted.kernel, state, query),
    }
    values = jnp.asarray(fitted.soups)
    return {k: np.asarray(soup.combine(w, values))[0] for k, w in weights.items()}


def project(encoded: Encoded, tokens: np.ndarray) -> np.ndarray:
    """[T, D]: the point of the training adapters' affine span nearest to tokens [T, D]."""
    flat = jnp.asarray(encoded.x.reshape(len(encoded.x), -1))
    own = jnp.asarray(tokens.reshape(1, -1))
    weights = span.affine_weights(flat @ flat.T, own @ flat.T)
    return np.asarray(soup.combine(weights, jnp.asarray(encoded.x)))[0]

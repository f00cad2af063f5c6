r"""One step of training a CLIP against frozen texts, and the pairs that a step reads.

.. math::
    L = -\frac1{2B} \sum_i \Bigl[
        \log \frac{e^{z_{ii}}}{\sum_{j \in N_i} e^{z_{ij}}} +
        \log \frac{e^{z_{ii}}}{\sum_{j : i \in N_j} e^{z_{ji}}} \Bigr], \qquad
    N_i = \{i\} \cup \{j : \text{text } j \text{ is not true of picture } i\}

Symbols: z logits of B pictures (rows) and their texts (columns). The text of a picture is its name,
or its category with probability ``categories``; a text that happens to be true of another picture
of the batch (the same name, or that picture's category) is no negative of it.

Reference: Radford et al. 2021 (arXiv:2103.00020), whose loss has N_i = all of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Bool, Float

from experiments import base_training
from experiments.clip import model
from experiments.clip.data import Pairs
from experiments.clip.settings import Settings
from experiments.finetuning.step import Report
from experiments.pictures.classifier import moved
from experiments.pictures.data import scaled

NEVER = -1e9  # logit of a pair that is no negative


class State(NamedTuple):
    """All that changes during a run."""

    step: Any  # int32 []: steps done
    params: Any  # of the CLIP
    optimizer: Any  # its state, with the averaged parameters


class Batch(NamedTuple):
    """What a step reads."""

    pictures: Any  # float32 [B, 32, 32, 3], -1 .. 1
    texts: Any  # float32 [B, text]: the embedding of each picture's text
    also: Any  # bool [B, B]: text j is true of picture i, j != i


def contrastive(z: Float[Array, "B B"], also: Bool[Array, "B B"]) -> Float[Array, ""]:
    """L of a batch.

    Args:
      z: logits, pictures by texts.
      also: pairs off the diagonal that are no negatives.
    """
    z = jnp.where(also, NEVER, z)
    own = jnp.arange(len(z))
    cross = optax.softmax_cross_entropy_with_integer_labels
    return (cross(z, own).mean() + cross(z.T, own).mean()) / 2


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Of the settings; every kernel that is not of a block decays under AdamW too."""
    return base_training.optimizer(settings, "layers", settings.weight_decay)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial(settings: Settings, config: model.ClipConfig, mean: Array) -> State:
    """The state before the first step; `mean` of the embeddings of the training texts."""
    params = model.init(jax.random.key(settings.seed), config, mean)
    return State(jnp.int32(0), params, optimizer(settings).init(params))


def mean_text(pairs: Pairs) -> np.ndarray:
    """The mean embedding of the names that are trained on, float32 [text]."""
    return pairs.embeddings[np.unique(pairs.name[pairs.train])].mean(0)


def batch(pairs: Pairs, settings: Settings, step: int) -> Batch:
    """The pairs of a step; they follow from seed and step alone.

    Names are equally frequent, whatever the number of styles that have them. Pictures are moved by
    up to 2 pixels and mirrored every other time, unless their name says left or right.
    """
    random, rows = np.random.default_rng([settings.seed, step]), pairs.train
    rows = rows[np.argsort(pairs.name[rows], kind="stable")]
    names, start, count = np.unique(pairs.name[rows], return_index=True, return_counts=True)
    pick = random.integers(0, len(names), settings.batch)
    place = (random.random(settings.batch) * count[pick]).astype(np.int64)
    chosen = rows[start[pick] + place]
    name, label = pairs.name[chosen], pairs.label[chosen] + len(pairs.names)
    text = np.where(random.random(settings.batch) < settings.categories, label, name)
    also = (text[None] == name[:, None]) | (text[None] == label[:, None])
    np.fill_diagonal(also, False)
    pixels = moved(pairs.pixels[chosen], random)
    mirrored = (random.random(settings.batch) < 0.5) & ~pairs.sided[name]
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    return Batch(scaled(pixels), pairs.embeddings[text], also)


def make(
    settings: Settings, config: model.ClipConfig
) -> Callable[[State, Batch], tuple[State, Report]]:
    """The jitted step ``(state, batch) -> (state, report)``; the state's buffers are donated."""
    rule = optimizer(settings)

    def step(state: State, given: Batch) -> tuple[State, Report]:
        def mean(params: Any) -> Array:
            z = model.logits(config, params, given.pictures, given.texts)
            return contrastive(z, given.also)

        value, grads = jax.value_and_grad(mean)(state.params)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = rule.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        report = Report(value, norm, jnp.isfinite(value) & jnp.isfinite(norm))
        return State(state.step + 1, params, inner), report

    return jax.jit(step, donate_argnums=0)

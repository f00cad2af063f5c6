r"""A small convolutional network that says style and label of a picture: the card's measure.

.. math::
    h = \mathrm{silu}(W\,\mathrm{mean}(\mathrm{conv}_4 \cdots \mathrm{conv}_1(x))), \qquad
    p(\mathrm{style}) = \mathrm{softmax}(A h), \quad p(\mathrm{label}) = \mathrm{softmax}(B h)

It is trained on the same real pictures as the DiT, moved by up to 2 pixels, and says how good it is
on those that are held out: accuracies of samples mean nothing without that figure. The features h
are those of the Fréchet distance.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.pictures.data import Pictures, scaled
from experiments.pictures.train import rows
from experiments.progress import Progress
from jlora.io import safetensors_file
from jlora.models.hf import flatten, nest

CHANNELS = (24, 48, 96, 96)  # of the four layers; the first three halve the sides
FEATURES = 64
BATCH, RATE, MOVED = 64, 2e-3, 2  # MOVED: pixels, each way
AT_ONCE = 256  # pictures of one call


class Classifier(nn.Module):
    """Pictures [n, 32, 32, 3] in -1 .. 1 to features and the logits of style and label."""

    styles: int
    labels: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        for n, channels in enumerate(CHANNELS):
            stride = 2 if n < len(CHANNELS) - 1 else 1
            x = nn.Conv(channels, (3, 3), (stride, stride), name=f"conv_{n}")(x)
            x = nn.silu(nn.GroupNorm(num_groups=8, name=f"norm_{n}")(x))
        h = nn.silu(nn.Dense(FEATURES, name="features")(x.mean((1, 2))))
        return h, nn.Dense(self.styles, name="style")(h), nn.Dense(self.labels, name="label")(h)


def _network(pictures: Pictures) -> Classifier:
    return Classifier(len(pictures.styles), len(pictures.labels))


def train(pictures: Pictures, settings: Any, folder: Path, workdir: Path) -> Any:
    """The parameters, float32; read from ``folder/classifier.safetensors`` where they are.

    Args:
      pictures: pictures; those not held out are trained on.
      settings: of the run: `classifier_steps` and `seed`.
      folder: of the run.
      workdir: of the progress.
    """
    path = folder / f"classifier-{settings.classifier_steps}.safetensors"
    if path.is_file():
        return load(path)
    network, steps = _network(pictures), settings.classifier_steps
    rule = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=1e-2)

    @jax.jit
    def step(params: Any, state: Any, x: Array, style: Array, label: Array) -> Any:
        def mean(params: Any) -> Array:
            outputs: Any = network.apply({"params": params}, x)
            cross = optax.softmax_cross_entropy_with_integer_labels
            return cross(outputs[1], style).mean() + cross(outputs[2], label).mean()

        value, grads = jax.value_and_grad(mean)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    start = jnp.zeros((1, *pictures.pixels.shape[1:]), jnp.float32)
    params: Any = jax.jit(network.init)(jax.random.key(settings.seed), start)["params"]
    state = rule.init(params)
    with Progress(workdir, "classifier", steps, "step") as bar:
        for number in range(steps):
            chosen = rows(pictures, settings, number)
            x = scaled(moved(pictures.pixels[chosen], np.random.default_rng([number, 1])))
            params, state, value = step(
                params, state, x, pictures.style[chosen] - np.int32(1), pictures.label[chosen]
            )
            bar.step(1, loss=float(value))
    save(path, params)
    return jax.device_get(params)


def moved(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Every picture moved by up to MOVED pixels each way on white."""
    side = pixels.shape[1]
    wide = np.pad(pixels, ((0, 0), (MOVED,) * 2, (MOVED,) * 2, (0, 0)), constant_values=255)
    places = random.integers(0, 2 * MOVED + 1, (len(pixels), 2))
    return np.stack([w[y : y + side, x : x + side] for w, (y, x) in zip(wide, places, strict=True)])


def save(path: Path, params: Any) -> None:
    """Writes the parameters."""
    flat = {name: np.asarray(x) for name, x in flatten(params).items()}
    safetensors_file.write(path, flat, {"format": "jlora"})


def load(path: Path) -> Any:
    """Reads what `save` wrote. Raises ValueError for a broken file."""
    return nest({k: jnp.asarray(x) for k, x in safetensors_file.read(path)[0].items()})


@functools.cache
def _applied(styles: int, labels: int) -> Any:
    return jax.jit(lambda params, x: Classifier(styles, labels).apply({"params": params}, x))


def apply(pictures: Pictures, params: Any, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Features [n, 64], style [n] (from 1, as in `Pictures`) and label [n] of pictures.

    Args:
      pictures: says which styles and labels there are.
      params: of `train`.
      pixels: uint8 [n, 32, 32, 3].
    """
    run, kept = _applied(len(pictures.styles), len(pictures.labels)), []
    size = min(AT_ONCE, len(pixels))
    for start in range(0, len(pixels), size):
        chosen = np.minimum(np.arange(start, start + size), len(pixels) - 1)
        h, style, label = run(params, scaled(pixels[chosen]))
        kept.append((np.asarray(h), np.argmax(style, -1) + 1, np.argmax(label, -1)))
    return tuple(np.concatenate(x)[: len(pixels)] for x in zip(*kept, strict=True))

r"""A CLIP whose text encoder is frozen and outside: pictures and text embeddings in one space.

.. math::
    u(x) = \frac{P^\top h(x)}{\|P^\top h(x)\|}, \qquad
    v(e) = \frac{Q^\top e + q}{\|Q^\top e + q\|}, \qquad
    \mathrm{logit}(x, e) = e^{\tau}\, u(x) \cdot v(e)

Symbols: h(x) the mean of the last states of a ViT, e the embedding of a text by a model that is not
trained, P ``image/kernel`` [width, joint], Q ``text/kernel`` [text, joint], q ``text/bias``,
:math:`\tau` ``scale`` []. At the start :math:`q = -Q^\top \bar e`, with the mean of the embeddings
of the training texts, since what all sentences share says nothing.

Parameters: ``{vit, image {kernel}, text {kernel, bias}, scale}``, ``vit`` as in `jlora.models.vit`.

Reference: Radford et al. 2021 (arXiv:2103.00020).
Deviates: only a projection of the text side is learned; the scale has no upper limit; the state is
the mean over all tokens, not that of the class token.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.io import safetensors_file
from jlora.io.json_file import read_json
from jlora.models.hf import SINGLE, flatten, nest
from jlora.models.vit import Vit, VitConfig

MODEL_TYPE = "frozen_text_clip"
SCALE = float(np.log(1 / 0.07))  # tau at the start, as in the paper
LARGEST = 1 << 28  # bytes of a file that is read


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Architecture; hashable, so it may be a static argument of jit."""

    vit: VitConfig  # of the pictures
    text: int  # width of the text embeddings
    joint: int  # width of the space of both


def init(key: PRNGKeyArray, config: ClipConfig, mean: Float[Array, " text"]) -> dict[str, Any]:
    """Fresh parameters, float32.

    Args:
      key: of the kernels.
      config: the architecture.
      mean: of the embeddings of the training texts.
    """
    vit, image, text = jax.random.split(key, 3)
    sample = jnp.zeros((1, config.vit.side, config.vit.side, config.vit.channels))
    project = config.text**-0.5 * jax.random.normal(text, (config.text, config.joint))
    wide = (config.vit.width, config.joint)
    return {
        "vit": Vit(config.vit).init(vit, sample)["params"],
        "image": {"kernel": config.vit.width**-0.5 * jax.random.normal(image, wide)},
        "text": {"kernel": project, "bias": -(mean @ project)},
        "scale": jnp.float32(SCALE),
    }


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def images(
    config: ClipConfig, params: Any, pictures: Float[Array, "b side side c"]
) -> Float[Array, "b joint"]:
    """u of pictures in -1 .. 1."""
    states = Vit(config.vit).apply({"params": params["vit"]}, pictures)
    return _unit(jnp.mean(jnp.asarray(states), axis=1) @ params["image"]["kernel"])


def texts(params: Any, embeddings: Float[Array, "m text"]) -> Float[Array, "m joint"]:
    """v of text embeddings."""
    return _unit(embeddings @ params["text"]["kernel"] + params["text"]["bias"][None])


def logits(
    config: ClipConfig, params: Any, pictures: Float[Array, "b side side c"],
    embeddings: Float[Array, "m text"],
) -> Float[Array, "b m"]:  # fmt: skip
    """How well each text fits each picture.

    Args:
      config: the architecture.
      params: as of `init`.
      pictures: in -1 .. 1.
      embeddings: of the texts, by the frozen text model.
    """
    return jnp.exp(params["scale"]) * images(config, params, pictures) @ texts(params, embeddings).T


def save(directory: Path, config: ClipConfig, params: Any) -> None:
    """Writes ``config.json`` and float16 ``model.safetensors``.

    Args:
      directory: made if it does not exist.
      config: the architecture.
      params: its parameters.

    Raises:
      ValueError: a parameter is missing, surplus, misshapen or not finite in float16.
    """
    with np.errstate(over="ignore"):  # what overflows is refused below, by name
        half = {name: np.asarray(x).astype(np.float16) for name, x in flatten(params).items()}
    _check(directory, half, config)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(directory / SINGLE, half, {"format": "jlora"})
    fields = {"model_type": MODEL_TYPE} | dataclasses.asdict(config)
    data = (json.dumps(fields, indent=2) + "\n").encode()
    safetensors_file.write_bytes(directory / "config.json", data)


def load(directory: Path) -> tuple[ClipConfig, dict[str, Any]]:
    """Reads what `save` wrote; the parameters in float32, in which they are computed with.

    Args:
      directory: its files need not be trusted.

    Raises:
      ValueError: a file is missing or broken, a field is unknown, a tensor is missing, surplus,
        misshapen, not float16 or not finite.
    """
    path = directory / "config.json"
    raw: Any = read_json(path)
    if (got := raw.pop("model_type", None)) != MODEL_TYPE:
        raise ValueError(f"{path}: model_type: got {got!r}, expected {MODEL_TYPE!r}")
    try:
        config = ClipConfig(**raw | {"vit": VitConfig(**raw["vit"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None
    tensors, _ = safetensors_file.read(directory / SINGLE, LARGEST)
    _check(directory / SINGLE, tensors, config)
    return config, nest({k: jnp.asarray(x.astype(np.float32)) for k, x in tensors.items()})


def _check(path: Path, tensors: dict[str, np.ndarray], config: ClipConfig) -> None:
    mean = jax.ShapeDtypeStruct((config.text,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = flatten(jax.eval_shape(lambda k, m: init(k, config, m), key, mean))
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise ValueError(f"{path}: got tensors missing or surplus {odd[:4]}, expected none")
    for name, x in tensors.items():
        if x.shape != shapes[name].shape or x.dtype != np.float16:
            raise ValueError(f"{path}: {name}: got {x.dtype}{list(x.shape)}, expected "
                             f"float16{list(shapes[name].shape)}")  # fmt: skip
        if bad := safetensors_file.not_finite(x):
            raise ValueError(f"{path}: {name}: got {bad} numbers that are not finite")

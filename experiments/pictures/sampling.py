"""Pictures drawn from a DiT, with guidance, and sheets of pictures as PNG."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.pictures.data import bytes_of
from experiments.pictures.sources import SIDE
from experiments.pictures.train import bind
from jlora.generation.diffusion.guidance import guided
from jlora.generation.diffusion.paths import rectified_flow
from jlora.generation.diffusion.samplers import Sampler, build
from jlora.io import safetensors_file
from jlora.models import dit

AT_ONCE = 25  # samples of one call


@functools.cache
def _sampler(config: dit.DiTConfig, steps: int) -> Any:
    shape = (SIDE, SIDE, config.channels)
    return build(guided(bind(config)), rectified_flow(), "velocity", shape, Sampler("euler", steps))


def sample(
    params: Any, config: dit.DiTConfig, styles: np.ndarray, words: np.ndarray, steps: int,
    guidance: float, seed: int,
) -> np.ndarray:  # fmt: skip
    """Pictures, uint8 [n, 32, 32, 3].

    Args:
      params: of the DiT.
      config: its architecture.
      styles: int32 [n], 0 for none.
      words: int32 [n, k], 0 for padding.
      steps: of Euler's method.
      guidance: scale of the condition; 1 is none.
      seed: of the noise; picture i does not depend on how many are asked for.
    """
    run, count = _sampler(config, steps), len(styles)
    size = min(AT_ONCE, count)
    kept = []
    for start in tqdm(range(0, count, size), desc="samples", unit="batch", mininterval=1.0):
        # the last batch is a whole one: one shape is compiled
        rows = np.minimum(np.arange(start, start + size), count - 1)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
        condition = dit.Condition(jnp.asarray(styles[rows]), jnp.asarray(words[rows]))
        kept.append(np.asarray(run(params, keys, condition, np.float32(guidance))))
    return bytes_of(np.concatenate(kept)[:count])


def sheet(rows: Sequence[np.ndarray], path: Path) -> None:
    """Writes rows of pictures, uint8 [n, 32, 32, 3] each, as one PNG, twice as large.

    Args:
      rows: from top to bottom; shorter ones are filled up with white.
      path: of the file, written to a temporary name and renamed.
    """
    width = max(map(len, rows))
    white = np.full((len(rows), width, SIDE, SIDE, 3), 255, np.uint8)
    for line, row in zip(white, rows, strict=True):
        line[: len(row)] = row
    whole = white.transpose(0, 2, 1, 3, 4).reshape(len(rows) * SIDE, width * SIDE, 3)
    picture = Image.fromarray(whole)
    stream = io.BytesIO()
    double = (2 * picture.width, 2 * picture.height)
    picture.resize(double, Image.Resampling.NEAREST).save(stream, format="PNG")
    safetensors_file.write_bytes(path, stream.getvalue())

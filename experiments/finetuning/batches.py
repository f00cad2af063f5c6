"""The rows of every step by grain: a random-access pipeline, so a step's rows follow from it alone.

Each pass over the rows is shuffled anew by (seed, pass). Nothing has to be remembered in order to
resume: step n reads `batches[n]`.
"""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from experiments.finetuning import mesh
from experiments.finetuning.packing import Rows, empty


def shuffled(rows: Rows, batch: int, seed: int) -> grain.MapDataset:
    """Training batches without end: ``shuffled(...)[step]`` is `Rows` of `batch` rows.

    Args:
      rows: all rows.
      batch: rows per step; a batch may reach into the next pass.
      seed: of the order.
    """
    source = [Rows(*(np.asarray(x[n]) for x in rows)) for n in range(len(rows.ids))]
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch)


def in_order(rows: Rows, batch: int) -> list[Rows]:
    """Batches of all rows once; the last one is filled up with rows that have no weight."""
    missing = -len(rows.ids) % batch
    full = Rows(
        *(np.concatenate(p) for p in zip(rows, empty(missing, rows.ids.shape[1]), strict=True))
    )
    return [Rows(*(x[n : n + batch] for x in full)) for n in range(0, len(full.ids), batch)]


def parts(rows: Rows, count: int, sharding: Any) -> Rows:
    """Rows as `count` equal parts [count, n / count, length], on the devices.

    Args:
      rows: [n, length].
      count: parts, a divisor of n.
      sharding: of the result.
    """
    split = Rows(*(x.reshape(count, -1, x.shape[-1]) for x in rows))
    return mesh.place(split, sharding)

r"""A microbatch as arrays: the samples of a job behind each other, padded to whole blocks.

A row of C tokens holds segment after segment. A segment is what one job has in the microbatch, its
samples in order, the rest of its last block padding. Samples of one job do not see each other: the
model is given `segments`, one number per sample, and `positions` that start at 0 in each.

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206.
Deviates: no.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jlora.packing.jobs import Microbatch, Piece, blocks

PADDING = -1  # segment of the places that hold no sample


class Row(NamedTuple):
    """One packed row of C tokens."""

    ids: Int[np.ndarray, "C"]  # tokens, 0 in padding
    positions: Int[np.ndarray, "C"]  # of a token in its sample, 0 in padding
    segments: Int[np.ndarray, "C"]  # number of the sample in the microbatch, `PADDING`
    jobs: Int[np.ndarray, "C/M"]  # job of each block, 0 where there is none


def row(
    microbatch: Microbatch,
    tokens: Callable[[Piece], Int[np.ndarray, "t"]],
    capacity: int,
    block: int,
) -> Row:
    """The arrays of a microbatch.

    Args:
      microbatch: of a plan; () gives a row of padding.
      tokens: of a sample, as many as its length.
      capacity: C, a multiple of M.
      block: M.

    Returns:
      The row.

    Raises:
      ValueError: over capacity, or a sample of another length than planned.
    """
    if blocks(microbatch, block) * block > capacity:
        raise ValueError(
            f"microbatch: takes {blocks(microbatch, block)} blocks of {block} tokens, expected at "
            f"most {capacity} tokens"
        )
    out = Row(
        np.zeros(capacity, np.int32),
        np.zeros(capacity, np.int32),
        np.full(capacity, PADDING, np.int32),
        np.zeros(capacity // block, np.int32),
    )
    at, number = 0, 0
    for job in sorted({p.job for p in microbatch}):
        start = at
        for piece in sorted(p for p in microbatch if p.job == job):
            ids = tokens(piece)
            if ids.shape != (piece.length,):
                raise ValueError(f"{piece}: got tokens {ids.shape}, expected ({piece.length},)")
            place = slice(at, at + piece.length)
            out.ids[place], out.segments[place] = ids, number
            out.positions[place] = np.arange(piece.length)
            at, number = at + piece.length, number + 1
        at = -(-at // block) * block
        out.jobs[start // block : at // block] = job
    return out

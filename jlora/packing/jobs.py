"""What a plan is made of: jobs, the pieces they consist of, and microbatches.

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206.
Deviates: no.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """One fine-tuning."""

    name: str  # unique among the jobs
    batches: tuple[tuple[int, ...], ...]  # lengths in tokens, by global batch and sample


class Piece(NamedTuple):
    """One sample of a job."""

    job: int  # index of the job
    batch: int  # index of its global batch
    sample: int  # place in that batch
    length: int  # tokens


Microbatch = tuple[Piece, ...]  # samples that run together; () is a bubble


def blocks(pieces: Sequence[Piece], block: int) -> int:
    """How many blocks a microbatch takes: the tokens of each job are padded to whole blocks.

    Args:
      pieces: of any jobs.
      block: tokens per block.

    Returns:
      The sum over jobs of ceil(tokens / block).
    """
    tokens: dict[int, int] = {}
    for p in pieces:
        tokens[p.job] = tokens.get(p.job, 0) + p.length
    return sum(-(-t // block) for t in tokens.values())


def pieces_of(jobs: Sequence[Job], members: Sequence[int], batch: int) -> list[Piece]:
    """The samples of one global batch of some jobs.

    Args:
      jobs: all jobs.
      members: indices of those to take; a job without such a batch has ended and adds nothing.
      batch: index of the global batch.

    Returns:
      Pieces in the order of the members and their samples.
    """
    return [
        Piece(m, batch, i, length)
        for m in members
        if batch < len(jobs[m].batches)
        for i, length in enumerate(jobs[m].batches[batch])
    ]


def check(jobs: Sequence[Job], capacity: int, block: int) -> None:
    """Refuses jobs that no plan can hold.

    Args:
      jobs: at least one.
      capacity: tokens per microbatch, a multiple of `block`.
      block: tokens per block.

    Raises:
      ValueError: no jobs, equal names, an empty batch, a length out of range, or a capacity that
        is no multiple of the block.
    """
    if not jobs:
        raise ValueError("jobs: got none, expected at least one")
    if block < 1 or capacity < block or capacity % block:
        raise ValueError(
            f"capacity: got {capacity}, expected a multiple of the block, {block}, above 0"
        )
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen:
            raise ValueError(f"jobs: got the name {job.name!r} twice, expected each once")
        seen.add(job.name)
        if not job.batches:
            raise ValueError(f"{job.name}: got no global batch, expected at least one")
        for number, lengths in enumerate(job.batches):
            if not lengths:
                raise ValueError(f"{job.name}: batch {number}: got no samples")
            for length in lengths:
                if not 1 <= length <= capacity:
                    raise ValueError(
                        f"{job.name}: batch {number}: got a sample of {length} tokens, expected 1 "
                        f"to {capacity}, the capacity of a microbatch"
                    )

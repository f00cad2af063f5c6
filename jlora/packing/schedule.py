r"""The order of microbatches: every sample once, weights never older than the paper allows.

==========  ==========================================================================
S           stages of the pipeline; 1 without one
first(a,g)  index of the first microbatch that holds samples of global batch g of job a
last(a,g)   index of the last one
==========  ==========================================================================

With S stages a microbatch leaves the pipeline S - 1 places after it entered. So that every sample
sees the weights of its job after the step before, the *bubble lemma* asks for

.. math:: \mathrm{first}(a, g) - \mathrm{last}(a, g - 1) \ge S

and no microbatch holds two global batches of one job. In round g each group in turn sends the
microbatches of its jobs' batches g. The last one of a group and the first one of the next become
one where they fit and the lemma still holds; where it does not hold, empty ones are put in.

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206, the bubble lemma and the merge pass.
Deviates: only neighbours are joined.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jlora.packing import bins as packer
from jlora.packing import groups as grouping
from jlora.packing.jobs import Job, Microbatch, Piece, blocks, check, pieces_of
from jlora.system import System

Pack = Callable[[Sequence[Piece], int, int], list[Microbatch]]


class Plan(NamedTuple):
    """Microbatches in the order in which they run."""

    microbatches: tuple[Microbatch, ...]  # () is a bubble
    steps: tuple[tuple[int, ...], ...]  # jobs whose global batch is complete after each of them
    groups: grouping.Groups  # of indices of jobs


class Rows(NamedTuple):
    """Microbatches that run as the rows of one step."""

    microbatches: tuple[Microbatch, ...]  # as many as there are rows; () is an empty row
    steps: tuple[int, ...]  # jobs whose global batch is complete after them


class Waste(NamedTuple):
    """What is computed for nothing."""

    packed: float  # share of the computed tokens, those of whole rows, that are of no sample
    alone: float  # the same, each job alone and its samples padded to the longest of the batch
    empty: int  # rows that hold nothing: bubbles, and those that fill up a step


def plan(
    jobs: Sequence[Job], capacity: int, block: int, stages: int = 1, pack: Pack = packer.milp
) -> Plan:
    """Groups, bins and order.

    Args:
      jobs: with the lengths of their samples.
      capacity: tokens per microbatch, a multiple of `block`.
      block: tokens to which a job's part of a microbatch is padded.
      stages: S.
      pack: `bins.milp`, or `bins.first_fit` where there is no time for it.

    Returns:
      A plan that `verify` accepts.

    Raises:
      ValueError: jobs that no plan can hold, or fewer than one stage.
    """
    check(jobs, capacity, block)
    if stages < 1:
        raise ValueError(f"stages: got {stages}, expected at least 1")
    groups = grouping.pairs(jobs, capacity, stages)
    order: list[Microbatch] = []
    for batch in range(max(len(job.batches) for job in jobs)):
        for members in groups:
            pieces = pieces_of(jobs, members, batch)
            new = pack(pieces, capacity, block) if pieces else []
            for number, microbatch in enumerate(new):
                _append(order, microbatch, capacity, block, stages, join=number == 0)
    return Plan(tuple(order), _steps(jobs, order), groups)


def _append(
    order: list[Microbatch], new: Microbatch, capacity: int, block: int, stages: int, *, join: bool
) -> None:
    """`new` in the last microbatch, behind it, or behind as many bubbles as it needs."""
    last: dict[int, int] = {}  # of a job: the last microbatch of the batch before
    for index, microbatch in enumerate(order):
        for p in microbatch:
            if any(p.job == q.job and p.batch < q.batch for q in new):
                last[p.job] = index
    ready = max((index + stages for index in last.values()), default=0)
    if join and order and ready <= len(order) - 1:
        both = tuple(sorted((*order[-1], *new)))
        if blocks(both, block) * block <= capacity:
            order[-1] = both
            return
    order.extend(() for _ in range(ready - len(order)))
    order.append(new)


def _steps(jobs: Sequence[Job], order: Sequence[Microbatch]) -> tuple[tuple[int, ...], ...]:
    left = {(a, g): len(b) for a, job in enumerate(jobs) for g, b in enumerate(job.batches)}
    steps = []
    for microbatch in order:
        done = set()
        for p in microbatch:
            left[p.job, p.batch] -= 1
            if not left[p.job, p.batch]:
                done.add(p.job)
        steps.append(tuple(sorted(done)))
    return tuple(steps)


def verify(plan: Plan, jobs: Sequence[Job], capacity: int, block: int, stages: int = 1) -> None:
    """Checks a plan against its jobs, whoever wrote it.

    Args:
      plan: the plan.
      jobs: what it is for.
      capacity: tokens per microbatch.
      block: tokens per block.
      stages: S.

    Raises:
      ValueError: a sample that is missing, twice or of another length, a microbatch over capacity
        or with two global batches of one job, a batch before the one it follows, or sooner than
        the bubble lemma allows; a step at another place than the end of its batch.
    """
    want = {p for b in range(max(len(j.batches) for j in jobs))
            for p in pieces_of(jobs, range(len(jobs)), b)}  # fmt: skip
    got = [p for m in plan.microbatches for p in m]
    if len(got) != len(set(got)) or set(got) != want:
        raise ValueError(
            f"plan: got {len(got)} samples, expected each of {len(want)} once; missing "
            f"{sorted(want - set(got))[:3]}, surplus {sorted(set(got) - want)[:3]}"
        )
    spans: dict[tuple[int, int], list[int]] = {}
    for index, microbatch in enumerate(plan.microbatches):
        if blocks(microbatch, block) * block > capacity:
            raise ValueError(f"microbatch {index}: over the capacity of {capacity} tokens")
        present = {(p.job, p.batch) for p in microbatch}
        if len(present) != len({job for job, _ in present}):
            raise ValueError(f"microbatch {index}: holds two global batches of one job")
        for key in present:
            spans.setdefault(key, []).append(index)
    for (job, batch), places in spans.items():
        if batch and min(places) - max(spans[job, batch - 1]) < stages:
            raise ValueError(
                f"{jobs[job].name}: batch {batch} starts at microbatch {min(places)}, expected "
                f"{max(spans[job, batch - 1]) + stages} or later ({stages} stages)"
            )
    if plan.steps != _steps(jobs, plan.microbatches):
        raise ValueError("plan: steps: expected each job's step at the end of its global batch")


def rows(plan: Plan, count: int) -> tuple[Rows, ...]:
    """A plan in steps of several microbatches: tokens of one row attend to that row alone.

    Attention of one row of C tokens takes C^2 products, of n rows of C / n tokens one n-th of it.

    Args:
      plan: a plan for one stage.
      count: rows per step, at least 1.

    Returns:
      All microbatches in their order; a step ends early where the next one would hold a second
      global batch of a job, and is filled up with empty rows.

    Raises:
      ValueError: fewer than one row.
    """
    if count < 1:
        raise ValueError(f"rows: got {count}, expected at least 1")
    out: list[Rows] = []
    held: list[Microbatch] = []
    done: set[int] = set()
    current: dict[int, int] = {}  # global batch of each job in the step
    for microbatch, steps in zip(plan.microbatches, plan.steps, strict=True):
        clash = any(current.get(p.job, p.batch) != p.batch for p in microbatch)
        if clash or len(held) == count:
            out.append(Rows((*held, *[()] * (count - len(held))), tuple(sorted(done))))
            held, done, current = [], set(), {}
        held.append(microbatch)
        done |= set(steps)
        current |= {p.job: p.batch for p in microbatch}
    out.append(Rows((*held, *[()] * (count - len(held))), tuple(sorted(done))))
    return tuple(out)


def waste(steps: Sequence[Rows], jobs: Sequence[Job], capacity: int) -> Waste:
    """Padding of a plan, and of running each job alone.

    Args:
      steps: of `rows`.
      jobs: what the plan is for.
      capacity: tokens of a row, all of which are computed.

    Returns:
      Shares of computed tokens that are no tokens of any sample.
    """
    batches = [b for job in jobs for b in job.batches]
    tokens = sum(sum(b) for b in batches)
    held = [m for step in steps for m in step.microbatches]
    padded = sum(len(b) * max(b) for b in batches)
    empty = sum(not m for m in held)
    return Waste(1 - tokens / (len(held) * capacity), 1 - tokens / padded, empty)


SYSTEM = System(
    name="LoRAFusion",
    paper="Zhu 2025, 2510.00206",
    symbol="plan",
    kind="mechanism",
    evidence="every sample once, capacity and the bubble lemma on random jobs; bins against "
    "exhaustive search; packed losses and gradients equal to those of each job alone",
    rows=(46,),
    tests=(
        "tests/packing/bins_test.py",
        "tests/packing/segments_test.py",
        "tests/packing/step_test.py",
        "tests/experiments/tuning/run_test.py",
    ),
    claim="lorafusion",
)

r"""Samples in as few microbatches as possible: first fit decreasing, and an integer program.

==========  ======================================================================
l_i, a(i)   tokens of sample i, and its job
C, M        capacity of a microbatch and block, in tokens
x_ij        whether sample i is in microbatch j
k_aj        blocks of job a in microbatch j
y_j         whether microbatch j is used
==========  ======================================================================

.. math::
    \min \sum_j y_j \quad \text{with} \quad \sum_j x_{ij} = 1, \quad
    \sum_{i : a(i) = a} l_i x_{ij} \le M k_{aj}, \quad M \sum_a k_{aj} \le C y_j, \quad
    y_j \ge y_{j+1}

and then, with the number of microbatches fixed, the fewest blocks in the last one: what is left
over there can join the last one of another group.

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206, the two-stage MILP with a greedy fallback.
Deviates: solved by `scipy.optimize.milp` (HiGHS); the first stage is skipped where first fit
decreasing meets the bound ceil(sum_a ceil(tokens_a / M) M / C).
"""

from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse

from jlora.packing.jobs import Microbatch, Piece, blocks


def first_fit(pieces: Sequence[Piece], capacity: int, block: int) -> list[Microbatch]:
    """First fit decreasing: the longest sample first, into the first microbatch with room.

    Args:
      pieces: of any jobs, each of at most `capacity` tokens.
      capacity: C, a multiple of M.
      block: M.

    Returns:
      Microbatches, the one with the fewest blocks last.
    """
    bins: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (-p.length, p)):
        for held in bins:
            if blocks([*held, piece], block) * block <= capacity:
                held.append(piece)
                break
        else:
            bins.append([piece])
    bins.sort(key=lambda b: -blocks(b, block))
    return [tuple(sorted(b)) for b in bins]


def bound(pieces: Sequence[Piece], capacity: int, block: int) -> int:
    """The fewest microbatches that any packing needs.

    Args:
      pieces: of any jobs.
      capacity: C.
      block: M.

    Returns:
      ceil(blocks of all M / C).
    """
    return -(-blocks(pieces, block) * block // capacity)


def milp(
    pieces: Sequence[Piece], capacity: int, block: int, seconds: float = 5.0
) -> list[Microbatch]:
    """The integer program; never more microbatches than first fit decreasing.

    Args:
      pieces: of any jobs, each of at most `capacity` tokens.
      capacity: C, a multiple of M.
      block: M.
      seconds: limit of each of the two stages; what is best by then is taken, or the greedy
        solution where nothing is.

    Returns:
      Microbatches, the one with the fewest blocks last.
    """
    greedy = first_fit(pieces, capacity, block)
    best, low = greedy, bound(pieces, capacity, block)
    if len(greedy) > low:
        best = _solve(pieces, capacity, block, len(greedy) - 1, seconds, last=False) or greedy
    if len(best) > 1:
        emptier = _solve(pieces, capacity, block, len(best), seconds, last=True)
        if emptier and len(emptier) <= len(best):
            last = lambda bins: blocks(bins[-1], block)  # noqa: E731
            if len(emptier) < len(best) or last(emptier) < last(best):
                best = emptier
    return best


def _solve(
    pieces: Sequence[Piece], capacity: int, block: int, n: int, seconds: float, *, last: bool
) -> list[Microbatch] | None:
    """At most n microbatches; None where there is no solution in time.

    Variables are x [I, n], k [A, n], y [n], in this order.
    """
    names = sorted({p.job for p in pieces})
    job = np.array([names.index(p.job) for p in pieces])
    length = np.array([p.length for p in pieces], np.float64)
    rows, most = len(pieces), capacity // block
    size = n * (rows + len(names) + 1)
    x = np.arange(rows * n).reshape(rows, n)
    k = rows * n + np.arange(len(names) * n).reshape(len(names), n)
    y = size - n + np.arange(n)

    def matrix(entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]], height: int):
        at, column, value = (np.concatenate(e) for e in zip(*entries, strict=True))
        return sparse.csr_matrix((value, (at, column)), shape=(height, size))

    each = np.repeat(np.arange(rows), n)
    once = matrix([(each, x.ravel(), np.ones(rows * n))], rows)
    segment = job[:, None] * n + np.arange(n)  # row of the constraint of (a, j)
    held = matrix(
        [
            (segment.ravel(), x.ravel(), np.repeat(length, n)),
            (np.arange(k.size), k.ravel(), np.full(k.size, -float(block))),
        ],
        k.size,
    )
    bins = np.tile(np.arange(n), len(names))
    room = matrix(
        [(bins, k.ravel(), np.ones(k.size)), (np.arange(n), y, np.full(n, -float(most)))], n
    )
    constraints = [
        optimize.LinearConstraint(once, 1, 1),
        optimize.LinearConstraint(held, -np.inf, 0),
        optimize.LinearConstraint(room, -np.inf, 0),
    ]
    if n > 1:
        steps = np.arange(n - 1)
        ones = np.ones(n - 1)
        ordered = matrix([(steps, y[1:], ones), (steps, y[:-1], -ones)], n - 1)
        constraints.append(optimize.LinearConstraint(ordered, -np.inf, 0))
    cost = np.zeros(size)
    cost[k[:, -1] if last else y] = 1.0
    upper = np.ones(size)
    upper[k] = most
    solved = optimize.milp(
        cost,
        integrality=np.ones(size),
        bounds=optimize.Bounds(0, upper),  # pyright: ignore[reportArgumentType]
        constraints=constraints,
        options={"time_limit": seconds},
    )
    if solved.x is None:
        return None
    chosen = np.round(solved.x[x]).astype(int)
    packed = [tuple(sorted(p for p, c in zip(pieces, chosen[:, j], strict=True) if c))
             for j in range(n)]  # fmt: skip
    packed = [b for b in packed if b]
    return sorted(packed, key=lambda b: -blocks(b, block))

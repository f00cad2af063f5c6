r"""Jobs in groups of at most two, long samples with short ones.

==========  =====================================================================
mu, sigma   mean and standard deviation of the tokens of a job's global batches
C           tokens per microbatch
S           stages of the pipeline
==========  =====================================================================

A job's next global batch may start S microbatches after its last one ended, since its weights
change in between. While a group waits, the others have to fill the pipeline. With

.. math:: m_a = \max(1, \lceil (\mu_a - \sigma_a / 4) / C \rceil), \qquad
    m_g = \max(1, \lceil \textstyle\sum_{a \in g} (\mu_a - \sigma_a / 4) / C \rceil)

microbatches that a job and a group need at least per round, a group is only formed where
:math:`\sum_{h \ne g} m_h \ge S - 1` for every group g.

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206, section on scheduling.
Deviates: pairs that leave too little work elsewhere are split again, the one with most tokens
first; the paper does not say which.
"""

import math
from collections.abc import Sequence

import numpy as np

from jlora.packing.jobs import Job

Groups = tuple[tuple[int, ...], ...]


def least(jobs: Sequence[Job], members: Sequence[int], capacity: int) -> int:
    """m_g: microbatches that a group needs at least per round.

    Args:
      jobs: all jobs.
      members: indices of the group.
      capacity: C.

    Returns:
      At least 1.
    """
    total = 0.0
    for m in members:
        tokens = [sum(lengths) for lengths in jobs[m].batches]
        total += max(0.0, float(np.mean(tokens) - np.std(tokens) / 4))
    return max(1, math.ceil(total / capacity))


def fills(jobs: Sequence[Job], groups: Groups, capacity: int, stages: int) -> bool:
    """Whether each group finds the others' microbatches between its own rounds.

    Args:
      jobs: all jobs.
      groups: of their indices.
      capacity: C.
      stages: S.

    Returns:
      True where the sum over the other groups is at least S - 1 for every group.
    """
    sizes = [least(jobs, g, capacity) for g in groups]
    return all(sum(sizes) - m >= stages - 1 for m in sizes)


def pairs(jobs: Sequence[Job], capacity: int, stages: int) -> Groups:
    """The groups.

    Args:
      jobs: all jobs.
      capacity: C.
      stages: S; 1 without a pipeline, where every pair is allowed.

    Returns:
      Indices of jobs, each once; where even single jobs do not fill the pipeline, single jobs.
    """
    means = [float(np.mean(np.concatenate(job.batches))) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda a: (means[a], a))
    groups: list[tuple[int, ...]] = [(order[i], order[-1 - i]) for i in range(len(order) // 2)]
    if len(order) % 2:
        groups.append((order[len(order) // 2],))
    while not fills(jobs, tuple(groups), capacity, stages):
        joined = [g for g in groups if len(g) == 2]
        if not joined:
            break
        most = max(joined, key=lambda g: sum(np.sum(b) for m in g for b in jobs[m].batches))
        at = groups.index(most)
        groups[at : at + 1] = [(m,) for m in most]
    return tuple(groups)

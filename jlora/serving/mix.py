r"""Which of a batch's components are multiplied with which rows, chosen by what is counted.

=====  ====================================================================================
b      rows of a batch, each with one new token
T      components of the adapters in it, each adapter once, up to a bucket's size
P      the same with an adapter once for every row that uses it, in blocks of `diagonal.BLOCK`
N      numbers of a component (`components.size`)
c      multiply-adds that take as long as reading one number
=====  ====================================================================================

.. math:: \text{shared: } T N (b + c), \qquad \text{own: } P N (1 + c)

Shared components meet all rows in two dense products, and a mask keeps what is a row's own
(`jlora.serving.components`): best where many rows use few adapters, as one adapter for all. Own
components meet one row (`jlora.serving.diagonal`): best where adapters differ, whatever their
ranks. They are taken where they count `GAIN` times less, as another form is another program.

Reference: none; both are counted as above, and the sizes are buckets, so that a program serves all
    mixes of one form and size.
Deviates: own components take P / T of the memory, at most (b + c) / (1 + c) / `GAIN`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jlora.serving import pages
from jlora.serving.components import BASE
from jlora.serving.diagonal import BLOCK

LEAST = 16  # smallest bucket of components
BALANCE = 8.0  # c of a core of a CPU, by its times at 32 rows; more on accelerators
GAIN = 2.0  # how many times less own components have to count


class Mix(NamedTuple):
    """The adapters of a batch, as a bank is to hold them."""

    names: tuple[str, ...]  # adapter n is the n-th; once a row where rows have their own
    numbers: Int[np.ndarray, "b"]  # the adapter of each row; `BASE`: none
    own: bool  # every row has components of its own


def plan(wanted: Sequence[str | None], ranks: Mapping[str, int]) -> Mix:
    """The cheaper form for a batch.

    Args:
      wanted: the adapter of each row; None: the base.
      ranks: components of each adapter.

    Returns:
      Names and numbers of that form.
    """
    each = tuple(name for name in wanted if name is not None)
    once = tuple(sorted(set(each)))
    shared = size(sum(ranks[name] for name in once)) * (len(wanted) + BALANCE)
    own = size(sum(blocks(ranks[name]) for name in each)) * (1 + BALANCE)
    alone = bool(each) and GAIN * own < shared
    at, numbers = 0, np.full(len(wanted), BASE, np.int32)
    for k, name in enumerate(wanted):
        if name is not None:
            numbers[k] = at if alone else once.index(name)
            at += 1
    return Mix(each if alone else once, numbers, alone)


def blocks(rank: int) -> int:
    """Components of an adapter in whole blocks.

    Args:
      rank: its own components.

    Returns:
      The next multiple of `diagonal.BLOCK`.
    """
    return -(-rank // BLOCK) * BLOCK


def size(count: int, least: int = LEAST) -> int:
    """The size that arrays for so many components have.

    Args:
      count: of the components.
      least: the smallest size.

    Returns:
      The first of least, 2 least, 3 least, 4 least, 6 least, 8 least, ... that is not below the
      count: at most half as many again, for adapters are read as often as the base is.
    """
    whole = pages.bucket(count, least)
    middle = whole // 4 * 3
    return middle if middle >= count and middle % least == 0 else whole

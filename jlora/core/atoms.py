"""Atoms: the pieces of a leaf's axes of which the axes of a view are made.

Reference: none.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Atom(NamedTuple):
    """A piece of an axis of the leaf."""

    kind: str  # 's', 'i', 'o'; '?' while the kinds are being found out
    size: int
    sources: tuple[tuple[str, int], ...]  # the axes of leaves, (path, axis), that it comes from
    copies: bool = False  # of 's': all slices are the same, by a broadcast


def regroup(
    atoms: Sequence[tuple[int, int]], shape: Sequence[int]
) -> list[list[tuple[int, int]]] | None:
    """The axes of another shape as pieces of the same atoms.

    Args:
      atoms: (number, size) of each atom, in the order of the present axes.
      shape: sizes of the new axes.

    Returns:
      The pieces of each new axis, (number of the atom, size); an atom that two axes share has a
      piece in both. None where an axis would need a part of an atom that does not divide it.
    """
    left = list(atoms)[::-1]
    groups: list[list[tuple[int, int]]] = []
    for size in shape:
        group, need = [], size
        while need != 1:
            if not left:
                return None
            atom, n = left.pop()
            if need % n == 0:
                group.append((atom, n))
                need //= n
            elif n % need == 0:
                group.append((atom, need))
                left.append((atom, n // need))
                need = 1
            else:
                return None
        groups.append(group)
    if any(n != 1 for _, n in left) or (left and not groups):
        return None
    if left:
        groups[-1].extend(left[::-1])
    return groups

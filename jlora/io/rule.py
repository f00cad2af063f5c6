"""One line of a name map: a pattern of paths, a template of module names, the layout of the leaf.

=====================  ============================================================================
in a template          stands for
=====================  ============================================================================
``\\1``, ``\\g<name>``   a group of the pattern
``{i}`` ... ``{l}``    the index on a stack axis; or the group of that name, which is then no axis
``{a|b}``              the names of the slices of a stack axis, of the first letter that is not used
=====================  ============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jlora.types import Json

INDICES = "ijkl"
PLACE = re.compile(r"\{([^{}]*)\}")
BRACKETS = re.compile(r"(.*)\[([^\[\]]+?)(\.T)?\]")


class Rule(NamedTuple):
    """One line of a name map."""

    pattern: str
    template: str
    kinds: str | None  # one letter per axis of the leaf: 's' stack, 'i' in, 'o' out

    def axes(self, groups: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The stack axes that the template names, in their order.

        Args:
          groups: the named groups of the pattern, which are not axes.

        Returns:
          Index letter -> the names of its slices, () where they are numbers.
        """
        names = PLACE.findall(self.template)
        letters = [text for text in names if "|" not in text]
        free = (letter for letter in INDICES if letter not in letters)
        axes = {letter: () for letter in letters if letter not in groups}
        axes |= {next(free): tuple(text.split("|")) for text in names if "|" in text}
        return dict(sorted(axes.items()))


class Match(NamedTuple):
    """The rule of a path, and what its pattern found there."""

    order: int
    rule: Rule
    match: re.Match[str]

    def numbers(self) -> dict[str, int]:
        """Returns the indices that the path holds, by letter."""
        groups = self.match.groupdict()
        return {k: int(v) for k, v in groups.items() if k in INDICES and v is not None}

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Returns what `Rule.axes` does, for the groups of this match."""
        return self.rule.axes(self.numbers())


def rule_of(pattern: str, value: str | Sequence[str]) -> Rule:
    """A line of a name map as a rule.

    Args:
      pattern: of paths.
      value: a template, or (template, kinds).

    Returns:
      The rule; not checked.
    """
    return Rule(pattern, value, None) if isinstance(value, str) else Rule(pattern, *value)


def check(pattern: Json, value: Json) -> None:
    """Refuses what is not a line of a name map.

    Args:
      pattern: a regex on site paths.
      value: a template, or (template, kinds).

    Raises:
      ValueError: anything else.
    """
    pair = (
        isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, str) for v in value)
    )
    if not isinstance(pattern, str) or not (isinstance(value, str) or pair):
        raise ValueError(
            f"name map: got {str(pattern)[:80]!r}: {str(value)[:80]!r}, expected pattern: template "
            "or pattern: [template, kinds]"
        )
    try:
        groups = re.compile(pattern).groupindex
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"name map: {pattern!r} is not a valid regular expression: {error}"
        ) from None
    rule = rule_of(pattern, value)
    for text in PLACE.findall(rule.template):
        names = text.split("|")
        if (
            (len(names) == 1 and text not in {*INDICES})
            or len(set(names)) < len(names)
            or not all(names)
        ):
            raise ValueError(
                f"name map: template {rule.template!r}: got {{{text}}}, expected an index "
                f"({', '.join(INDICES)}) or the names of slices, {{a|b}}"
            )
    if len(PLACE.findall(rule.template)) > len(INDICES):
        raise ValueError(
            f"name map: template {rule.template!r}: expected at most {len(INDICES)} places"
        )
    most, kinds = len(rule.axes(())), rule.kinds
    least = len(rule.axes(groups))
    if kinds is None:
        return
    experts = BRACKETS.fullmatch(rule.template) is not None
    if not kinds or set(kinds) - {*"sio"} or not least <= kinds.count("s") <= most + experts:
        raise ValueError(
            f"name map: {pattern!r}: got kinds {kinds!r}, expected a letter of 's', 'i', 'o' per "
            f"axis and 's' for {least} of them"
        )

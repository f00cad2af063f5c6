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
from typing import Any, NamedTuple

INDICES = "ijkl"
PLACE = re.compile(r"\{([^{}]*)\}")
BRACKETS = re.compile(r"(.*)\[([^\[\]]+?)(\.T)?\]")


class Rule(NamedTuple):
    """One line of a name map."""

    pattern: str
    template: str
    kinds: str | None  # one letter per axis of the leaf: 's' stack, 'i' in, 'o' out

    def axes(self, groups: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Stack axis -> the names of its slices, () where they are numbers; axes in their order.

        Args:
          groups: the named groups of the pattern, which are no axes.
        """
        found = PLACE.findall(self.template)
        letters = [text for text in found if "|" not in text]
        free = (letter for letter in INDICES if letter not in letters)
        axes = {letter: () for letter in letters if letter not in groups}
        axes |= {next(free): tuple(text.split("|")) for text in found if "|" in text}
        return dict(sorted(axes.items()))


class Match(NamedTuple):
    """The rule of a path, and what its pattern found there."""

    order: int
    rule: Rule
    match: re.Match[str]

    def numbers(self) -> dict[str, int]:
        """The indices that the path holds."""
        found = self.match.groupdict()
        return {k: int(v) for k, v in found.items() if k in INDICES and v is not None}

    def axes(self) -> dict[str, tuple[str, ...]]:
        """As `Rule.axes`."""
        return self.rule.axes(self.numbers())


def rule_of(pattern: str, value: str | Sequence[str]) -> Rule:
    return Rule(pattern, value, None) if isinstance(value, str) else Rule(pattern, *value)


def check(pattern: Any, value: Any) -> None:
    """Raises ValueError unless these are a pattern and a template, or a template and kinds."""
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
        raise ValueError(f"name map: {pattern!r} is no regular expression: {error}") from None
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

"""The styles of a run: which are seen, and in which way the others are held out.

=============  ===================================================================================
seen           transforms of a source at some values, and drawings of some artists
interior       a seen family at a value between seen ones
exterior       a seen family at a value outside of the seen ones
unseen family  a family of which no value is seen
unseen artist  drawings of an artist of whom none are seen
=============  ===================================================================================

Hues are angles; a fifth of the circle lies between the last seen one and the first, and the
exterior value in it. Generators are fitted on seen styles alone; rates, steps and kernels are
chosen on them.
"""

from __future__ import annotations

import dataclasses

LEVELS = ("seen", "interior", "exterior", "unseen family", "unseen artist")
HELD_OUT = LEVELS[1:]


@dataclasses.dataclass(frozen=True)
class Style:
    """One style."""

    name: str  # "google hue 60", "openmoji"
    level: str  # of LEVELS
    source: str  # key of `experiments.pictures.sources.STYLES`
    family: str = ""  # key of `transforms.FAMILIES`; "": as drawn
    value: float = 0.0  # of the family


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of a family."""

    source: str
    family: str
    seen: tuple[float, ...]
    interior: tuple[float, ...] = ()
    exterior: tuple[float, ...] = ()


TRANSFORMS = (
    Values("google", "hue", (60, 120, 180, 240), (150,), (300,)),
    Values("google", "ground", (0, 72, 144, 216), (108,), (288,)),
    Values("google", "invert", (0.7, 0.85, 1.0), (0.925,), (0.3,)),
    Values("google", "pixelate", (6, 8, 16), (11,), (4,)),
    Values("google", "lines", (1.0, 2.0, 4.0), (3.0,), (7.0,)),
    Values("google", "saturation", (0.0, 0.5, 2.0), (0.25,), (3.0,)),
    Values("twitter", "tint", (0, 72, 144, 216), (108,), (288,)),
    Values("twitter", "posterise", (3, 4, 6), (5,), (2,)),
    Values("twitter", "gamma", (0.4, 2.0, 3.0), (2.5,), (5.0,)),
    Values("twitter", "blur", (0.7, 1.5, 2.5), (2.0,), (4.0,)),
)
UNSEEN = (Values("google", "halftone", (), (), (3.0, 5.0)),
          Values("google", "stripes", (), (), (4.0, 8.0)))  # fmt: skip
SEEN_ARTISTS = ("openmoji", "outline")  # of one project
UNSEEN_ARTISTS = ("fluent", "fluent_modern", "fluent_contrast")  # of another
PRESETS = ("smoke", "quick", "full")


def _styles(values: Values, level: str, chosen: tuple[float, ...]) -> list[Style]:
    return [
        Style(f"{values.source} {values.family} {v:g}", level, values.source, values.family, v)
        for v in chosen
    ]


def styles(preset: str) -> tuple[Style, ...]:
    """The styles of a preset, seen ones first, then by level.

    Args:
      preset: "smoke" (9 styles of one source, for tests), "quick" (39) or "full" (62).

    Raises:
      KeyError: an unknown preset.
    """
    families = {"smoke": 2, "quick": 6, "full": len(TRANSFORMS)}[preset]
    unseen = {"smoke": 1, "quick": 2, "full": 4}[preset]
    out = [Style(n, "seen", n) for n in (() if preset == "smoke" else SEEN_ARTISTS)]
    for values in TRANSFORMS[:families]:
        for level in ("seen", "interior", "exterior"):
            chosen = getattr(values, level)
            some = chosen[:2] if preset == "smoke" and level == "seen" else chosen
            out += _styles(values, level, some)
    pairs = [style for values in UNSEEN for style in _styles(values, "unseen family",
                                                              values.exterior)]  # fmt: skip
    out += pairs if unseen == len(pairs) else pairs[:: len(pairs) // unseen]
    if preset != "smoke":
        out += [Style(n, "unseen artist", n) for n in UNSEEN_ARTISTS]
    return tuple(sorted(out, key=lambda style: LEVELS.index(style.level)))

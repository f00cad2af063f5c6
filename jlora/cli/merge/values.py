"""Parameters as the configuration writes them, read at one site: numbers, gradients, filters.

==========  ====================================================================================
a number    the same everywhere
a gradient  a list of numbers from the first layer to the last, interpolated; of true and false,
            steps. What is in no layer takes the first
filters     a list of {filter, value}; the first entry whose text is part of the name counts
==========  ====================================================================================

Reference: mergekit's format (0.1.5).
Deviates: a filter that is part of no name is an error.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.io.errors import near
from jlora.types import Json

Scope = tuple[str, Mapping[str, Json]]  # (where the parameters stand, they themselves)
LAYER = re.compile(r"(?:^|[./_])(\d+)(?=[./_]|$)")


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key, got and expected."""


def layer_of(path: str) -> int | None:
    """The layer that a site's name says: its first number.

    Args:
      path: of the site.

    Returns:
      The number; None without one.
    """
    match = LAYER.search(path)
    return int(match[1]) if match else None


def resolve(value: Json, where: str, path: str, place: float | None) -> Json:
    """A parameter at a site.

    Args:
      value: as the configuration has it: a number, a gradient, filters.
      where: its key, for messages.
      path: of the site.
      place: 0..1, of its layer; None: it has none.

    Returns:
      The value there.

    Raises:
      ConfigError: no filter matches, or a gradient that is none.
    """
    resolved = _resolve(value, where, path, place)
    if resolved is None:
        raise ConfigError(f"{where}: no filter matches the site {path}; add an entry without one")
    return resolved


def first(
    scopes: Sequence[Scope], key: str, path: str, place: float | None
) -> tuple[str | None, Json]:
    """A parameter at the nearest level that gives it at a site.

    Args:
      scopes: levels of parameters, the nearest first.
      key: of the parameter.
      path: of the site.
      place: 0..1, of its layer; None: it has none.

    Returns:
      (its key with the level, its value); (None, None) where no level gives it.

    Raises:
      ConfigError: a gradient or filter that is not valid.
    """
    for where, given in scopes:
        if key in given:
            value = _resolve(given[key], f"{where}.{key}", path, place)
            if value is not None:
                return f"{where}.{key}", value
    return None, None


def _resolve(value: Json, where: str, path: str, place: float | None) -> Json:
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        for entry in value:
            entry = keys(entry, where, ("value",), ("filter",))
            if matches(entry.get("filter"), path):
                return _resolve(entry["value"], where, path, place)
        return None
    if isinstance(value, list):
        points, steps = [_written(v) for v in value], all(isinstance(v, bool) for v in value)
        if not points or not (steps or all(_number(v) for v in points)):
            raise ConfigError(f"{where}: got {value!r}, expected numbers")
        if place is None:
            raise ConfigError(f"{where}: a gradient, but {path} has no layer; use a filter")
        if steps:
            return points[int(place * (len(points) - 1))]
        return float(np.interp(place * (len(points) - 1), range(len(points)), points))
    return _written(value)


def matches(word: Json, path: str) -> bool:
    """Whether a filter is part of a site's name, or of its weight's in torch.

    Args:
      word: the filter; None and "*" match all.
      path: of the site.

    Returns:
      True or False.
    """
    return word in (None, "*") or str(word) in path or str(word) in _torch_name(path)


def check_filters(value: Json, where: str, paths: Sequence[str]) -> None:
    """Refuses a filter that no site is left for.

    Args:
      value: of a parameter.
      where: its key, for the message.
      paths: of all sites.

    Raises:
      ConfigError: names the filter and what is near it.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
        return
    left = list(paths)
    for entry in value:
        entry = keys(entry, where, ("value",), ("filter",))
        word = entry.get("filter")
        taken = [path for path in left if matches(word, path)]
        if word not in (None, "*") and not taken:
            why = "is part of no site's name (it is plain text, no regular expression)"
            if any(matches(word, path) for path in paths):
                why = "has no site left: earlier entries took them"
            raise ConfigError(
                f"{where}: the filter {word!r} {why}; nearest: {near(str(word), paths)}"
            )
        check_filters(entry["value"], where, taken)
        left = [path for path in left if path not in taken]


def keys(
    data: Json, where: str, required: tuple[str, ...], free: tuple[str, ...]
) -> dict[str, Json]:
    """A mapping of given keys.

    Args:
      data: as the configuration has it.
      where: its key, for messages.
      required: keys that must be there.
      free: keys that may be there.

    Returns:
      A dict.

    Raises:
      ConfigError: not a mapping, other keys, or a required one is missing.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: got {data!r}, expected keys {required + free}")
    for key in required:
        if key not in data:
            raise ConfigError(f"{where}: lacks {key!r}")
    for key in data:
        if key not in required + free:
            raise ConfigError(f"{where}: got key {key!r}, expected one of {required + free}")
    return dict(data)


def _torch_name(path: str) -> str:
    module, slash, _ = path.rpartition("/")
    return f"{module}.weight" if slash else path


def _written(value: Json) -> Json:
    """YAML reads 1e-5, without a point, as text; mergekit as a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""The options of a merge method by name: which exist, and refusals that name what was expected."""

import difflib
import inspect
from collections.abc import Mapping

import jax
import numpy as np

from jlora.merging.engine.table import METHODS, Merging
from jlora.types import Dynamic

ELSEWHERE = {  # what others call a method -> what it is here
    "linear": ("concat (the weighted sum, exactly)", "truncated (the same, cut to a rank)"),
    "average": ("concat, without weights",),
    "cat": ("concat", "peft_cat"),
    "svd": ("truncated", "peft_svd"),
    "magnitude_prune": ("magnitude", "peft_magnitude_prune"),
    "ties_svd": ("ties", "peft_ties_svd"),
    "task_addition": ("task_arithmetic",),
    "passthrough": ("concat with one model",),
}


def options_of(row: Merging) -> dict[str, Dynamic]:
    """The options that a method takes.

    Args:
      row: the method.

    Returns:
      {name: default}.
    """
    parameters = list(inspect.signature(row.function).parameters.values())[2:]
    return {p.name: p.default for p in parameters if p.name not in ("key", "keys", "ids")}


RENAMED = {"normalise": "normalize", "strength": "scale", "lambda": "scale"}


def check_options(row: Merging, options: Mapping[str, Dynamic]) -> None:
    """Refuses an option that a method does not have, and the lack of one that it needs.

    Args:
      row: the method.
      options: what was given, by name.

    Raises:
      ValueError: an unknown option, or one without a default that is missing; the error lists
        those that exist.
    """
    known = options_of(row)
    for name in options:
        if name not in known:
            new = RENAMED.get(name)
            hint = f"; {name} is called {new} here" if new in known else ""
            raise ValueError(
                f"{row.name}: options: got {name!r}, expected one of {sorted(known)}{hint}"
            )
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in options:
            got = sorted(options) or "none"
            raise ValueError(
                f"{row.name}: options: got {got}, expected {name!r}, which has no default"
            )


def lookup(name: str) -> Merging:
    """The record of a method.

    Args:
      name: as `jlora systems merging` lists them.

    Returns:
      The record.

    Raises:
      ValueError: an unknown name, for which the error suggests close ones; no name at all.
    """
    if not isinstance(name, str):
        raise ValueError(f"merge method: got {type(name).__name__}, expected a name, as in "
                         "merge('ties', adapters)")  # fmt: skip
    if name not in METHODS:
        close = ELSEWHERE.get(name) or difflib.get_close_matches(name, METHODS, 3)
        hint = f"; for {name!r} use {' or '.join(close)}" if close else ""
        raise ValueError(f"merge method: got {name!r}, expected one of {sorted(METHODS)}{hint}")
    return METHODS[name]


def check_rank(name: str, rank: Dynamic, full: int) -> None:
    """Refuses a rank that no site can have.

    Args:
      name: of the option, for the error.
      rank: what was given.
      full: the largest min(d_in, d_out) of the sites.

    Raises:
      ValueError: rank is not a whole number in 1..full.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= full:
        raise ValueError(
            f"{name}: got {rank}, expected 1 to {full}, the largest min(d_in, d_out) of the sites"
        )


def split(
    options: Mapping[str, Dynamic],
) -> tuple[dict[str, Dynamic], tuple[tuple[str, Dynamic], ...]]:
    """Options in those that are traced and those that are static.

    Args:
      options: by name.

    Returns:
      (arrays, the others as sorted pairs).
    """
    arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array | np.ndarray)}
    return arrays, tuple(sorted((k, v) for k, v in options.items() if k not in arrays))

"""JSON of files that others may have written: as the standard has it, or one error in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jlora.io.errors import FormatError
from jlora.types import Json

KINDS = {dict: "a JSON object", list: "a JSON list"}
MAX_BYTES = 2**28  # of one file


def read_json(path: str | os.PathLike[str], kind: type = dict, *, constants: bool = False) -> Json:
    """The JSON value in a file.

    Args:
      path: the file.
      kind: dict or list, what must be in it; dict, as most files are.
      constants: whether NaN and Infinity, which Python writes, may be in it. False: the standard
        has
        none.

    Returns:
      A dict or list, as `kind` says.

    Raises:
      FormatError: missing, too long, not JSON or of another kind: path, got and expected.
    """
    expected = KINDS[kind]
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise FormatError(path, f"got {size} bytes, expected {expected} of {MAX_BYTES} at most")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FormatError(path, f"missing, expected {expected}") from None
    except OSError as error:
        raise FormatError(path, f"cannot be read ({error}), expected {expected}") from error
    try:
        value = parse_json(path, data, constants=constants)
    except FormatError as error:
        raise FormatError(
            path, f"got no JSON{error.why.removeprefix('bad JSON')}, expected {expected}"
        ) from error
    if not isinstance(value, kind):
        raise FormatError(path, f"got {type(value).__name__}, expected {expected}")
    return value


def parse_json(path: str | os.PathLike[str], data: bytes, *, constants: bool = False) -> Json:
    """JSON as the standard has it: no duplicate keys, NaN, or nesting without end.

    A byte order mark, which editors put in front of UTF-8, is skipped.

    Args:
      path: where the data is from, for errors.
      data: UTF-8.
      constants: whether NaN and Infinity may be in it. False: the standard has none.

    Returns:
      The value.

    Raises:
      FormatError: not such JSON.
    """

    def unique(pairs):
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {key[:80]!r}")
            result[key] = value
        return result

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_constant=None if constants else refuse,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"bad JSON ({error})") from error

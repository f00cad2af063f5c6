"""Strict reading and atomic, deterministic writing of safetensors files from strangers.

The `safetensors` package parses the format; this file adds what it leaves open: limits, duplicate
keys, holes, wrong sizes, weights that are not finite, and pickles under another name. A file is
accepted as a whole or refused as a whole.

Layout: 8 bytes little endian header length N | N bytes of JSON, ``{name: {dtype, shape,
data_offsets}}`` | the tensors' bytes, without gaps.

Source: https://huggingface.co/docs/safetensors (format description).
Deviates: duplicate keys, non-finite numbers and headers over 16 MiB are errors here.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora.io.errors import FormatError

MAX_HEADER = 16 * 2**20
MAX_BYTES = 8 * 2**30
MAX_NAME = 1024
MAX_AXES = 8

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".msgpack"}


def read(
    path: str | os.PathLike[str], max_bytes: int = MAX_BYTES
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Args:
      path: the file. Only regular files are read; names of pickles are refused unread.
      max_bytes: larger files are refused unread.

    Returns:
      ``(tensors, metadata)``: arrays own their memory and are finite; bfloat16 comes as ml_dtypes'.

    Raises:
      FormatError: anything else than one whole, consistent, finite file.
    """
    data = read_bytes(path, max_bytes)
    metadata = _checked_header(path, data)
    try:
        views = safetensors.deserialize(data)
    except Exception as error:  # SafetensorError is no ValueError; nothing of it may leak out.
        raise FormatError(path, f"not a safetensors file ({error})") from error
    tensors = {}
    for name, view in views:
        flat = np.frombuffer(view["data"], dtype=DTYPES[view["dtype"]])
        array = flat.reshape(view["shape"]).copy()
        bad = _not_finite(array)
        if bad:
            raise FormatError(path, f"{name!r} has {bad} of {array.size} values NaN or infinite")
        tensors[name] = array
    return tensors, metadata


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes tensors to `path`: whole or not at all; equal tensors give equal bytes.

    Args:
      path: the file; its directory exists.
      tensors: name -> array of a dtype of `DTYPES`; all values finite.
      metadata: text for the header; PEFT and transformers want ``{"format": "pt"}``.

    Raises:
      FormatError: a name, dtype or value that `read` would refuse.
    """
    write_bytes(path, to_bytes(path, tensors, metadata))


def to_bytes(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> bytes:
    """The bytes `write` writes; `path` is named in errors only."""
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value, order="C")
        if array.dtype not in DTYPES.values():
            raise FormatError(path, f"{name!r} has dtype {array.dtype}, which the format lacks")
        if _not_finite(array):
            raise FormatError(path, f"{name!r} has values that are NaN or infinite")
        arrays[name] = array
    data = safetensors.numpy.save(arrays, dict(metadata))
    _checked_header(path, data)
    return data


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The content of one regular file, at most `max_bytes` long."""
    if Path(path).suffix.lower() in PICKLES:
        raise FormatError(path, "pickles and the like can run code; convert it to .safetensors")
    try:
        # O_NONBLOCK: opening a pipe somebody put there must not hang.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise FormatError(path, "not a regular file")
            if info.st_size > max_bytes:
                raise FormatError(path, f"{info.st_size} bytes, more than the limit of {max_bytes}")
            data = file.read(info.st_size + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"cannot be read ({error})") from error
    if len(data) != info.st_size:
        raise FormatError(path, "changed while it was read")
    return data


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a temporary file beside `path` and renames it: readers see the old or the new one."""
    folder, name = os.path.split(os.fspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parse_json(path: str | os.PathLike[str], data: bytes) -> Any:
    """JSON as the standard has it: no duplicate keys, NaN, or nesting without end."""

    def unique(pairs):
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {key[:80]!r}")
            result[key] = value
        return result

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"bad JSON ({error})") from error


def _checked_header(path: str | os.PathLike[str], data: bytes) -> dict[str, str]:
    """Checks the header against the file; returns its metadata."""
    if len(data) < 8:
        raise FormatError(path, f"{len(data)} bytes: shorter than the 8 bytes of a header length")
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    if length > MAX_HEADER or 8 + length > len(data) or not text.startswith(b"{"):
        if data[:4] == b"PK\x03\x04" or data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise FormatError(path, "a zip or pickle under another name; it will not be opened")
        raise FormatError(
            path, f"a header of {length} bytes in {len(data)}, starting {text[:8]!r}; expected '{{'"
        )
    header = parse_json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(path, "__metadata__ must map text to text")
    spans = []
    for name, entry in header.items():
        begin, end = _checked_entry(path, name, entry)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise FormatError(path, f"{name!r} starts at byte {begin}, not {position}: {kind}")
        position = end
    if position != len(data) - 8 - length:
        raise FormatError(
            path, f"tensors take {position} bytes, the file has {len(data) - 8 - length} for them"
        )
    return metadata


def _checked_entry(path: str | os.PathLike[str], name: str, entry: Any) -> tuple[int, int]:
    """Checks one tensor's entry; returns its byte span."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise FormatError(path, f"bad tensor name {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(path, f"{name!r}: want exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise FormatError(path, f"{name!r}: dtype {entry['dtype']!r} is none of {sorted(DTYPES)}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise FormatError(path, f"{name!r}: bad shape {str(shape)[:80]}")
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise FormatError(path, f"{name!r}: bad data_offsets {str(span)[:80]}")
    need = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if span[1] - span[0] != need:
        raise FormatError(
            path,
            f"{name!r}: {entry['dtype']} {shape} takes {need} bytes, offsets give "
            f"{span[1] - span[0]}",
        )
    return span[0], span[1]


def _not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite, by the bits of their exponents.

    Arithmetic, even `isfinite` of bfloat16, may warn of signalling NaNs before they are refused.
    """
    if array.dtype.kind not in "fV":  # V: bfloat16
        return 0
    bits = np.dtype(f"u{array.dtype.itemsize}")
    exponent = np.asarray(np.inf, array.dtype).view(bits)
    return int(((array.view(bits) & exponent) == exponent).sum())


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )

"""Strict reading and atomic, deterministic writing of safetensors files from untrusted sources.

The `safetensors` package parses the format; this file adds what it leaves open: limits, duplicate
keys, holes, wrong sizes, weights that are not finite, and pickles under another name. A file is
accepted as a whole or refused as a whole.

Layout: 8 bytes little endian header length N | N bytes of JSON, ``{name: {dtype, shape,
data_offsets}}`` | the tensors' bytes, without gaps.

Source: https://huggingface.co/docs/safetensors (format description).
Deviates: duplicate keys, non-finite numbers and headers over 16 MiB are errors here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import IO

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora.io.errors import FormatError
from jlora.io.json_file import parse_json
from jlora.io.whole_file import read_bytes, regular, write_bytes
from jlora.types import Json

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
# What weights of a base model may have besides: read and written bit by bit, never computed with.
FLOAT8: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
EVERY_DTYPE: dict[str, np.dtype] = {
    **DTYPES,
    **FLOAT8,
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
}


def read(
    path: str | os.PathLike[str],
    max_bytes: int = MAX_BYTES,
    *,
    dtypes: Mapping[str, np.dtype] = DTYPES,
    finite: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Args:
      path: the file. Only regular files are read; names of pickles are refused unread.
      max_bytes: larger files are refused unread; 8 GiB, more than any adapter has.
      dtypes: those that are accepted: `DTYPES`, or for a base model `EVERY_DTYPE`.
      finite: refuse values that are NaN or infinite, as no adapter has them. A base model has some
        where it should (a mask of -inf), which a reader that passes them on leaves alone.

    Returns:
      (tensors, metadata): arrays own their memory; bfloat16 and float8 come as ml_dtypes'.

    Raises:
      FormatError: anything else than one whole, consistent (and with `finite`, finite) file.
    """
    data = read_bytes(path, max_bytes)
    metadata, _ = _checked_header(path, data, len(data), dtypes)
    try:
        views = safetensors.deserialize(data)
    except Exception as error:  # SafetensorError is no ValueError; nothing of it may leak out.
        raise FormatError(path, f"not a safetensors file ({error})") from error
    tensors = {}
    for name, view in views:
        flat = np.frombuffer(view["data"], dtype=dtypes[view["dtype"]])
        array = flat.reshape(view["shape"]).copy()
        bad = not_finite(array) if finite else 0
        if bad:
            raise FormatError(path, f"{name!r} has {bad} of {array.size} values NaN or infinite")
        tensors[name] = array
    return tensors, metadata


def header(
    path: str | os.PathLike[str], dtypes: Mapping[str, np.dtype] = EVERY_DTYPE
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the tensors of a file, of which only the header is read.

    Args:
      path: the file, of any size.
      dtypes: those that are accepted; all, as no value is used.

    Returns:
      Name -> (shape, dtype).

    Raises:
      FormatError: as `read`, but for the values.
    """
    with regular(path) as (file, size):
        entries, _ = _start(path, file, size, dtypes)
    return {n: (tuple(e["shape"]), dtypes[e["dtype"]]) for n, e in entries.items()}


def tensor(
    path: str | os.PathLike[str], name: str, dtypes: Mapping[str, np.dtype] = EVERY_DTYPE
) -> np.ndarray:
    """One tensor of a file of any size, bit by bit; its values may be NaN or infinite.

    Args:
      path: the file.
      name: of the tensor.
      dtypes: those that are accepted; all, as no value is used.

    Returns:
      A read-only array.

    Raises:
      FormatError: as `header`, or there is none of that name.
    """
    with regular(path) as (file, size):
        entries, begin = _start(path, file, size, dtypes)
        if name not in entries:
            raise FormatError(path, f"has no {name!r}")
        first, last = entries[name]["data_offsets"]
        file.seek(begin + first)
        data = file.read(last - first)
    if len(data) != last - first:
        raise FormatError(path, "changed while it was read")
    return np.frombuffer(data, dtypes[entries[name]["dtype"]]).reshape(entries[name]["shape"])


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    dtypes: Mapping[str, np.dtype] = DTYPES,
    finite: bool = True,
) -> None:
    """Writes tensors to `path`: whole or not at all; equal tensors give equal bytes.

    Args:
      path: the file; its directory exists.
      tensors: name -> array of a dtype of `dtypes`.
      metadata: text for the header; PEFT and transformers want ``{"format": "pt"}``.
      dtypes: as for `read`.
      finite: refuse values that are NaN or infinite; as for `read`.

    Raises:
      FormatError: a name, dtype or value that `read` would refuse.
    """
    write_bytes(path, to_bytes(path, tensors, metadata, dtypes=dtypes, finite=finite))


def to_bytes(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    dtypes: Mapping[str, np.dtype] = DTYPES,
    finite: bool = True,
) -> bytes:
    """The bytes that `write` writes.

    Args:
      path: named in errors only.
      tensors: name -> array of a dtype of `dtypes`.
      metadata: text for the header.
      dtypes: as for `read`.
      finite: refuse values that are NaN or infinite; as for `read`.

    Returns:
      The whole file.

    Raises:
      FormatError: a name, dtype or value that `read` would refuse.
    """
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value, order="C")
        if array.dtype not in dtypes.values():
            raise FormatError(path, f"{name!r} has dtype {array.dtype}, which the format lacks")
        if finite and not_finite(array):
            raise FormatError(path, f"{name!r} has values that are NaN or infinite")
        arrays[name] = array
    data = safetensors.numpy.save(arrays, dict(metadata))
    _checked_header(path, data, len(data), dtypes)
    return data


def _start(
    path: str | os.PathLike[str], file: IO[bytes], size: int, dtypes: Mapping[str, np.dtype]
) -> tuple[dict[str, dict[str, Json]], int]:
    """The entries of an open file, and where its tensors begin."""
    start = file.read(8)
    start += file.read(min(int.from_bytes(start, "little"), MAX_HEADER, size))
    _, entries = _checked_header(path, start, size, dtypes)
    return entries, len(start)


def _checked_header(
    path: str | os.PathLike[str], data: bytes, size: int, dtypes: Mapping[str, np.dtype]
) -> tuple[dict[str, str], dict[str, dict[str, Json]]]:
    """Checks the header, with which `data` begins, against a file of `size` bytes.

    Returns its metadata and its entries.
    """
    if size < 8:
        raise FormatError(path, f"{size} bytes: shorter than the 8 bytes of a header length")
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    if length > MAX_HEADER or 8 + length > size or not text.startswith(b"{"):
        if data[:4] == b"PK\x03\x04" or data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise FormatError(path, "a zip or pickle under another name; it will not be opened")
        raise FormatError(
            path, f"a header of {length} bytes in {size}, starting {text[:8]!r}; expected '{{'"
        )
    header = parse_json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(path, "__metadata__ must map text to text")
    spans = []
    for name, entry in header.items():
        begin, end = _checked_entry(path, name, entry, dtypes)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise FormatError(path, f"{name!r} starts at byte {begin}, not {position}: {kind}")
        position = end
    if position != size - 8 - length:
        raise FormatError(
            path, f"tensors take {position} bytes, the file has {size - 8 - length} for them"
        )
    return metadata, header


def _checked_entry(
    path: str | os.PathLike[str], name: str, entry: Json, dtypes: Mapping[str, np.dtype]
) -> tuple[int, int]:
    """Checks one tensor's entry; returns its byte span."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise FormatError(path, f"bad tensor name {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(path, f"{name!r}: want exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise FormatError(path, f"{name!r}: dtype {entry['dtype']!r} is none of {sorted(dtypes)}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise FormatError(path, f"{name!r}: bad shape {str(shape)[:80]}")
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise FormatError(path, f"{name!r}: bad data_offsets {str(span)[:80]}")
    need = math.prod(shape) * dtypes[entry["dtype"]].itemsize
    if span[1] - span[0] != need:
        raise FormatError(
            path,
            f"{name!r}: {entry['dtype']} {shape} takes {need} bytes, offsets give "
            f"{span[1] - span[0]}",
        )
    return span[0], span[1]


def not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite, by the bits of their exponents.

    Arithmetic, even `isfinite` of bfloat16, may warn of signalling NaNs before they are refused.

    Args:
      array: of any dtype.

    Returns:
      The number; 0 for integers and float8.
    """
    if array.dtype.kind not in "fV" or array.dtype.itemsize == 1:  # V: bfloat16
        return 0
    bits = np.dtype(f"u{array.dtype.itemsize}")
    exponent = np.asarray(np.inf, array.dtype).view(bits)
    flat, step = array.reshape(-1).view(bits), 2**16  # in parts, which take no memory
    parts = (flat[k : k + step] & exponent == exponent for k in range(0, flat.size, step))
    return sum(int(part.sum()) for part in parts)


def _naturals(value: Json) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )

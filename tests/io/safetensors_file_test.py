"""The strict reader: what it gives back, and that everything else is a FormatError."""

import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jlora.io import FormatError, safetensors_file

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.asarray([1.5, -2.0], np.float32).astype(jnp.bfloat16),
    "c": np.asarray([[7]], np.int64),
    "e": np.zeros((0, 3), np.float32),
}


def raw(header: dict | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(1,), span=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_round_trip_is_bitwise_and_keeps_dtypes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, TENSORS, {"format": "pt"})
    tensors, metadata = safetensors_file.read(path)
    assert metadata == {"format": "pt"}
    assert set(tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]  # no temporary file is left


def test_bytes_are_those_of_the_library_and_do_not_depend_on_order():
    floats = {k: v for k, v in TENSORS.items() if v.dtype != jnp.bfloat16}
    want = safetensors.numpy.save(floats, {"format": "pt"})
    for order in (sorted(floats), sorted(floats, reverse=True)):
        made = safetensors_file.to_bytes("x", {k: floats[k] for k in order}, {"format": "pt"})
        assert made == want


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "shorter"),
        (b"\x01\x02\x03", "shorter"),
        (raw(b"{}", length=2**40), "header of"),
        (raw(b"{}", length=17 * 2**20) + b" " * (18 * 2**20), "header of"),
        (raw(b"[]"), "expected '{'"),
        (raw(b"{"), "bad JSON"),
        (raw(b'{"a":' + b"[" * 100_000), "bad JSON"),
        (raw(b'{"a": \xff}'), "bad JSON"),
        (raw(b'{"a": NaN}'), "bad JSON"),
        (raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"0" * 4), "dupl"),
        (raw({"__metadata__": {"a": 1}}), "text to text"),
        (raw({"a": entry("F31")}, b"0" * 4), "dtype"),
        (raw({"a": entry(["F32"])}, b"0" * 4), "dtype"),
        (raw({"a": entry() | {"more": 1}}, b"0" * 4), "exactly"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}, b"0" * 4), "exactly"),
        (raw({"a": entry(shape=[-1])}, b"0" * 4), "shape"),
        (raw({"a": entry(shape=[True])}, b"0" * 4), "shape"),
        (raw({"a": entry(shape=[1.0])}, b"0" * 4), "shape"),
        (raw({"a": entry(shape=[1] * 9)}, b"0" * 4), "shape"),
        (raw({"a": entry(shape=[2**62, 2**62])}, b"0" * 4), "takes"),
        (raw({"a": entry(shape=[2])}, b"0" * 4), "takes 8 bytes"),
        (raw({"a": entry(span=[4, 0])}, b"0" * 4), "data_offsets"),
        (raw({"a": entry(span=[0, 4, 8])}, b"0" * 4), "data_offsets"),
        (raw({"a": entry(), "b": entry(span=[2, 6])}, b"0" * 6), "overlaps"),
        (raw({"a": entry(), "b": entry()}, b"0" * 4), "overlaps"),
        (raw({"a": entry(), "b": entry(span=[6, 10])}, b"0" * 10), "gap"),
        (raw({"a": entry()}, b"0" * 8), "8 for them"),
        (raw({"a": entry()}, b"0" * 3), "3 for them"),
        (raw({"": entry()}, b"0" * 4), "name"),
        (raw({"a\x00b": entry()}, b"0" * 4), "name"),
        (raw({"a": entry()}, struct.pack("<f", float("nan"))), "1 of 1 values NaN"),
        (raw({"a": entry()}, struct.pack("<f", float("inf"))), "NaN or infinite"),
        (raw({"a": entry()}, b"\x01\x00\x80\x7f"), "NaN or infinite"),  # a signalling NaN
        (raw({"a": entry("BF16", (2,))}, b"\x00\x00\x80\x7f"), "NaN or infinite"),
        (raw({"a": entry("BF16", (2,))}, b"\x00\x00\x81\x7f"), "1 of 2"),  # signalling as well
        (b"PK\x03\x04" + b"0" * 100, "zip or pickle"),
        (b"\x80\x02}q\x00." + b"0" * 100, "zip or pickle"),
    ],
)
def test_damaged_files_are_refused(tmp_path, data, why):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=why) as error:
        safetensors_file.read(path)
    assert str(path) in str(error.value)


def test_a_header_length_that_looks_like_a_pickle_is_fine(tmp_path):
    tensors = {"a": np.zeros(1, np.float32)}
    data = safetensors_file.to_bytes("x", tensors, {})
    grow = 0x0280 - int.from_bytes(data[:8], "little")
    padded = struct.pack("<Q", 0x0280) + data[8:-4] + b" " * grow + data[-4:]
    assert padded[:2] == b"\x80\x02"
    (tmp_path / "x.safetensors").write_bytes(padded)
    assert list(safetensors_file.read(tmp_path / "x.safetensors")[0]) == ["a"]


def test_pickles_pipes_folders_links_and_giants_are_not_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"0")
    with pytest.raises(FormatError, match="can run code"):
        safetensors_file.read(tmp_path / "x.bin")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(FormatError):
            safetensors_file.read(tmp_path / name)
    (tmp_path / "big.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(FormatError, match="limit of 99"):
        safetensors_file.read(tmp_path / "big.safetensors", max_bytes=99)
    with pytest.raises(FormatError, match="null byte"):
        safetensors_file.read("a\x00b")


def test_writing_refuses_what_reading_would(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    for tensors, why in (
        ({"a": np.asarray([np.nan], np.float32)}, "NaN"),
        ({"a": np.zeros(1, np.complex64)}, "complex64"),
        ({"": np.zeros(1, np.float32)}, "name"),
    ):
        with pytest.raises(FormatError, match=why):
            safetensors_file.write(path, tensors, {})
        assert path.read_bytes() == b"old"


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        safetensors_file.write(path, TENSORS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == b"old"

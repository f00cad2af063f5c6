"""Mutated documents: refused with the reader's own error, or read; never anything else.

Documents are what is read besides tensors: the description inside an Orbax checkpoint and inside an
exported function (JSON), merge configurations and name maps (YAML), bare safetensors files.
`JLORA_FUZZ` sets the number of cases of the long run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import jlora as jl
from jlora.cli import files
from jlora.cli.merge import config as configs
from jlora.cli.merge import dense, documents
from jlora.io import FormatError, exported, orbax, safetensors_file
from tests.io.fuzz_test import JUNK, bytes_changed, header_changed

# Orbax closes its event loop on the first array that fails; reads of others end after that.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. None[\s\S]*Event loop is closed"
    ":pytest.PytestUnraisableExceptionWarning"
)
FEW, MANY = 200, int(os.environ.get("JLORA_FUZZ", "10000"))

MERGE = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5, density: [0.2, 0.8]}
  - model: base+b
    parameters:
      weight:
        - {filter: self_attn, value: [0.1, 0.9]}
        - {value: 0.5}
parameters: {rank: 16, normalize: true}
names: llama
missing: error
seed: 0
dtype: bfloat16
tokenizer_source: base
out: {path: merged, format: peft, rank: 8, dtype: float32}
"""
SLICES = """\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: 0.5}
dtype: float32
"""
NAMES = r"""
layers/(q|k)/kernel: 'model.layers.{i}.self_attn.\1_proj'
layers/kv: ['model.layers.{i}.self_attn.{k_proj|v_proj}', ssio]
"""
SITES = tuple(jl.Site(f"{k}/q", (3, 4, 6), "sio", jnp.dtype("float32"), ("dot",)) for k in range(2))


def mutated(draw, value: Any) -> Any:
    """One place somewhere inside lost, replaced, repeated or invented."""
    inner = value.keys() if isinstance(value, dict) else range(len(value))
    keys = sorted(inner, key=str)
    if not keys:
        return draw(JUNK)
    key = draw(st.sampled_from(keys))
    if isinstance(value[key], dict | list) and draw(st.integers(0, 3)):
        part = mutated(draw, value[key])
        return {**value, key: part} if isinstance(value, dict) else [
            part if k == key else v for k, v in enumerate(value)
        ]  # fmt: skip
    how = draw(st.sampled_from(["lose", "replace", "invent"]))
    if isinstance(value, dict):
        if how == "lose":
            return {k: v for k, v in value.items() if k != key}
        return {**value, key if how == "replace" else draw(st.text(max_size=8)): draw(JUNK)}
    rest = list(value)
    if how == "lose":
        del rest[key]
    else:
        rest[key : key + (how == "replace")] = [draw(JUNK)]
    return rest


class Document(NamedTuple):
    """A good document and how it is read."""

    data: bytes
    parse: Callable[[bytes], Any]  # for mutations of what it says; None: of its bytes alone
    print: Callable[[Any], bytes]
    load: Callable[[Path, bytes], Any]  # (a folder to write to, the document)
    errors: tuple[type[Exception], ...]


def _json(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _yaml(value):
    return yaml.safe_dump(value).encode("utf-8", "surrogatepass")


def _written(read, name="file"):
    def load(folder, data):
        (folder / name).write_bytes(data)
        return read(folder / name)

    return load


def documents_of(folder: Path) -> dict[str, Document]:
    adapter = jl.Adapter(
        {s.path: {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((3, 2, 6))} for s in SITES},
        {s.path: {"scale": jnp.ones(3)} for s in SITES},
        tuple((s, jl.LoRA(2)) for s in SITES),
    )
    jl.io.save_adapter(folder / "orbax", adapter)
    inside = next(p for p in (folder / "orbax" / "meta").rglob("*") if p.name == "metadata")
    place = inside.relative_to(folder / "orbax")

    def orbax_load(there, data):
        copy = there / "orbax"
        if not copy.exists():
            shutil.copytree(folder / "orbax", copy)
        (copy / place).write_bytes(data)
        return jl.io.restore_adapter(copy)

    def signed(meta):
        """With the checksum of what it says now: the checks behind it are met."""
        if isinstance(meta, dict) and "crc32" in meta:
            meta = {k: v for k, v in meta.items() if k != "crc32"}
            meta["crc32"] = orbax._crc_json(meta)
        return _json(meta)

    def merge(path):
        return dense.settled(configs.parse(documents.read(path), path.parent))

    def named(path):
        return files.names_of(str(path)).table(
            [jl.Site(path, (2, 2, 2, 3), "ssio", jnp.dtype("float32")) for path in ("layers/kv",)]
        )

    export = exported.to_bytes((adapter.sites,))
    tensors = safetensors_file.to_bytes("x", {"a.b": np.ones((2, 3), np.float32)}, {"format": "pt"})
    text = (yaml.safe_load, _yaml)
    wrong = (configs.ConfigError,)
    return {
        "orbax": Document(inside.read_bytes(), json.loads, signed, orbax_load, (FormatError,)),
        "exported": Document(
            export, json.loads, _json, lambda _, data: exported.from_bytes(data), (FormatError,)
        ),
        "merge": Document(MERGE.encode(), *text, _written(merge), wrong),
        "slices": Document(SLICES.encode(), *text, _written(merge), wrong),
        "names": Document(
            NAMES.encode(), *text, _written(named), (ValueError,)
        ),
        "safetensors": Document(
            tensors, None, None, _written(safetensors_file.read), (FormatError,)
        ),
        "header": Document(tensors, None, None, _written(safetensors_file.header), (FormatError,)),
    }  # fmt: skip


def run(folder: Path, cases: int, only=None, phases=tuple(Phase)) -> dict[str, int]:
    """Counts by document and outcome."""
    known = {k: d for k, d in documents_of(folder).items() if only in (None, k)}
    there = folder / "there"
    there.mkdir()
    counts: dict[str, int] = {}

    @settings(max_examples=cases, deadline=None, derandomize=True, database=None, phases=phases,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def body(data):
        names = sorted(known) + [k for k in known if k != "orbax"] * 6  # it takes a while
        name = data.draw(st.sampled_from(names))
        one = known[name]
        if one.parse is None:
            change = data.draw(st.sampled_from([bytes_changed, header_changed]))
            try:
                new = change(data.draw, one.data)
            except (ValueError, IndexError):
                return
        elif data.draw(st.integers(0, 3)):
            new = one.print(mutated(data.draw, one.parse(one.data)))
        else:
            new = bytes_changed(data.draw, one.data)
        try:
            one.load(there, new)
            outcome = "accepted"
        except one.errors as error:
            assert len(str(error)) < 2000
            outcome = "refused"
        counts[f"{name} {outcome}"] = counts.get(f"{name} {outcome}", 0) + 1

    body()
    return counts


def test_mutated_documents_are_refused_or_read(tmp_path):
    counts = run(tmp_path, FEW)
    refused = sum(n for k, n in counts.items() if k.endswith("refused"))
    assert refused > sum(counts.values()) // 3, counts


@pytest.mark.long
def test_ten_thousand_mutated_documents(tmp_path):
    counts = run(tmp_path, MANY)
    print(counts)
    assert sum(counts.values()) > 0.9 * MANY, counts


def test_the_fuzzer_sees_a_reader_that_does_not_check(tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "sites_of", lambda folder, entries: entries[0]["path"])
    with pytest.raises(Exception) as caught:
        run(tmp_path, 10 * FEW, "exported", [Phase.generate])
    assert not isinstance(caught.value, FormatError)

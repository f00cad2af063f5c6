"""Mutated adapter files: refused with `FormatError`, or the same shapes; never anything else.

PEFT directories of every kind that is read, and one-file adapters of kohya / LyCORIS and diffusers.
`JLORA_FUZZ` sets the number of cases of the long run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import jlora as jl
from jlora.io import FormatError, safetensors_file
from jlora.io.peft import directory as peft
from jlora.io.peft import read as peft_read

HERE = Path(__file__).parent
CONVOLUTIONS = ("loha_core", "lokr_core", "lokr_whole", "lokr_whole_one")
# None with a dora_scale: without it a module is LoRA, LoHa or LoKr, which each may be there.
LYCORIS = ("lora_core", "loha_core", "lokr", "lokr_core_both", "lokr_unbalanced", "lokr_whole")

NAMES = {
    "bert": [
        *("lora_patterns", "lora_layers", "lora_exclude", "lora_linear", "lora_embedding", "dora"),
        *(
            "loha",
            "lokr",
            "lokr_factored",
            "vera",
            "oft",
            "boft",
            "adalora",
            "adalora_pruned",
            "hira",
        ),
    ],
    "llama": ["lora_all", "ia3"],
}
KOHYA = ["lora_patterns", "dora", "loha", "lokr_factored"]
DIFFUSERS = ["lora_patterns", "dora"]
FEW, MANY = 300, int(os.environ.get("JLORA_FUZZ", "10000"))
SECONDS = 20.0  # of CPU for one file; the deadline of its patterns is 10

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../../etc/passwd", "..", "/", "a\x00", "(a|aa)+b\\b.*c", "(", "all-linear"]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 9), max_size=2),
)


def split(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def bytes_changed(draw, data: bytes) -> bytes:
    """Truncated, extended, bits flipped, chunks repeated or dropped, header length replaced."""
    how = draw(st.sampled_from(["cut", "grow", "flip", "drop", "length"]))
    at = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return data[:at]
    if how == "grow":
        return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if how == "drop":
        return data[:at] + data[at + draw(st.integers(1, 64)) :]
    length = draw(
        st.sampled_from([0, 1, 7, 8, max(0, len(data) - 8), len(data), 2**24, 2**63, 2**64 - 1])
    )
    return struct.pack("<Q", length) + data[8:]


def header_changed(draw, data: bytes) -> bytes:
    """A well-formed file that says something else: names, dtypes, shapes, offsets, values."""
    header, body = split(data)
    keys = sorted(key for key in header if key != "__metadata__")
    key = draw(st.sampled_from(keys))
    how = draw(
        st.sampled_from(["dtype", "shape", "span", "lose", "rename", "copy", "value", "junk"])
    )
    entry = dict(header[key])
    if how == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F16", "BF16", "F64", "I32", "I64", "F8_E4M3", "X"]))
        if draw(st.booleans()) and entry["dtype"] in ("F16", "BF16"):  # of the right size
            entry["shape"] = [*entry["shape"][:-1], 2 * entry["shape"][-1]]
        header[key] = entry
    elif how == "shape":
        shape = draw(st.permutations(entry["shape"]))
        extra = draw(st.sampled_from([[], [1], [0], [-1], [2**62]]))
        header[key] = {**entry, "shape": [*shape, *extra]}
    elif how == "span":
        header[key] = {**entry, "data_offsets": draw(st.lists(st.integers(-4, 4096), max_size=3))}
    elif how == "lose":
        del header[key]
        if draw(st.booleans()):  # and its bytes, so that the file itself is fine
            tensors = arrays(data)
            del tensors[key]
            return safetensors_file.to_bytes("x", tensors, header.get("__metadata__", {}))
    elif how == "rename":
        other = draw(st.one_of(st.text(max_size=12), st.sampled_from(keys)))
        name = draw(
            st.sampled_from([other, key.replace("base_model.", ""), f"../{key}", key + ".x"])
        )
        header[name] = header.pop(key)
    elif how == "copy":
        tensors = arrays(data)
        tensors[draw(st.sampled_from([key + "2", key.replace(".0.", ".7."), "x"]))] = tensors[key]
        return safetensors_file.to_bytes("x", tensors, header.get("__metadata__", {}))
    elif how == "value":
        begin, end = entry["data_offsets"]
        bad = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        at = begin + 4 * draw(st.integers(0, (end - begin) // 4 - 1))
        body = body[:at] + struct.pack("<f", bad) + body[at + 4 :]
    else:
        header[key] = draw(JUNK)
    return joined(header, body)


def arrays(data: bytes) -> dict[str, np.ndarray]:
    header, body = split(data)
    header.pop("__metadata__", None)
    return {
        key: np.frombuffer(body[slice(*e["data_offsets"])], np.float32).reshape(e["shape"])
        for key, e in header.items()
    }


def config_changed(draw, data: bytes) -> bytes:
    """A config with a field lost, replaced or invented, or damaged bytes."""
    if draw(st.integers(0, 3)) == 0:
        return bytes_changed(draw, data)
    config = json.loads(data)
    key = draw(st.sampled_from(sorted(config)))
    how = draw(st.sampled_from(["lose", "replace", "invent"]))
    if how == "lose":
        del config[key]
    else:
        config[key if how == "replace" else draw(st.text(max_size=8))] = draw(JUNK)
    return json.dumps(config).encode("utf-8", "surrogatepass")


def form(adapter):
    return {
        (part, site, name): (array.shape, str(array.dtype))
        for part in ("trainable", "frozen")
        for site, arrays in getattr(adapter, part).items()
        for name, array in arrays.items()
    }


class Source(NamedTuple):
    """Good files and how they are read."""

    config: bytes | None  # a PEFT directory's; None where there is only the weights' file
    weights: bytes
    load: Callable[[Path], Any]  # of the folder with the files
    want: dict[Any, Any]  # the form of what it gives


def neighbour(name):
    """The model and names of another test file."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_fuzz", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


experts = neighbour("peft/parameters_test")
wide = neighbour("peft/lycoris_conv_test")
lycoris = neighbour("kohya/conv_test")
unet = neighbour("diffusers_test")


def sources(golden, folder):
    """All adapters that are mutated."""
    made = []
    for kind, names in NAMES.items():
        model = golden[kind]

        def load(path, model=model):
            return jl.io.load_peft(path, model.names, model.params, layout="in_out")

        for name in names:
            files = ((model.path / name / f).read_bytes() for f in (peft.CONFIG, peft.WEIGHTS))
            made.append(Source(*files, load, form(load(model.path / name))))
    for name in experts.ADAPTERS:
        files = ((experts.GOLDEN / name / f).read_bytes() for f in (peft.CONFIG, peft.WEIGHTS))
        made.append(Source(*files, experts.load, form(experts.load(experts.GOLDEN / name))))
    for name in CONVOLUTIONS:

        def load(path):
            return jl.io.load_peft(path, wide.NAMES, wide.SITES[wide.flax_model])

        files = ((wide.GOLDEN / name / f).read_bytes() for f in (peft.CONFIG, peft.WEIGHTS))
        made.append(Source(*files, load, form(load(wide.GOLDEN / name))))
    for name in LYCORIS:
        path = lycoris.GOLDEN / f"{name}.safetensors"

        def load(path):
            return lycoris.load(path / peft.WEIGHTS, lycoris.flax_model)

        want = form(lycoris.load(path, lycoris.flax_model))
        made.append(Source(None, path.read_bytes(), load, want))
    for name, component in unet.ADAPTERS.items():
        path = unet.GOLDEN / name / unet.FILE

        def load(path, component=component):
            return unet.load(path / peft.WEIGHTS, component)

        made.append(Source(None, path.read_bytes(), load, form(unet.load(path, component))))
    model = golden["bert"]
    for names, save, read in (
        (KOHYA, jl.io.save_kohya, jl.io.load_kohya),
        (DIFFUSERS, jl.io.save_diffusers, jl.io.load_diffusers),
    ):
        for name in names:
            path = folder / peft.WEIGHTS
            save(
                path,
                jl.io.load_peft(model.path / name, model.names, model.params, layout="in_out"),
                model.names,
            )

            def load(path, read=read):
                return read(path / peft.WEIGHTS, model.names, model.params, layout="in_out")

            made.append(Source(None, path.read_bytes(), load, form(load(folder))))
    return made


def told_changed(draw, data: bytes) -> bytes:
    """The JSON inside the header's metadata, where diffusers keeps its config."""
    header, body = split(data)
    told = header["__metadata__"]["lora_adapter_metadata"].encode()
    changed = config_changed(draw, told).decode("utf-8", "replace")
    return joined({**header, "__metadata__": {"lora_adapter_metadata": changed}}, body)


def check(source, folder, changes, draw, known):
    """Mutates one adapter, loads it, and counts (refused, accepted)."""
    config, data = source.config, source.weights
    for change in changes:
        try:
            if change == "config" and config is not None:
                config = config_changed(draw, config)
            elif change == "config":
                data = (told_changed if b"lora_adapter_metadata" in data else header_changed)(
                    draw, data
                )
            else:
                data = (bytes_changed if change == "bytes" else header_changed)(draw, data)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            break  # the first mutation left nothing that the second can take apart
    if (config, data) == (source.config, source.weights):
        known["unchanged"] += 1
        return
    (folder / peft.CONFIG).write_bytes(config or b"")
    (folder / peft.WEIGHTS).write_bytes(data)
    start = time.process_time()
    try:
        got = source.load(folder)
    except FormatError:
        known["refused"] += 1
        return
    finally:
        assert time.process_time() - start < SECONDS
    # Accepted: other values, scales or hyper-parameters perhaps, but the same arrays, and the
    # model's own shapes: at most a rank is another one. Only where nothing in the file says which
    # modules there are can a whole one be gone.
    known["accepted"] += 1
    got, present = form(got), {where for _, where, _ in form(got)}
    silent = source.config is None and b"lora_adapter_metadata" not in data
    want = {key for key in source.want if not silent or key[1] in present}
    assert present and set(got) == want
    for key, (shape, _) in got.items():
        other = source.want[key][0]
        assert len(shape) == len(other)
        assert sum(a != b for a, b in zip(shape, other, strict=True)) <= 1, key


def run(golden, folder, cases, phases=tuple(Phase)):
    known = {"refused": 0, "accepted": 0, "unchanged": 0}
    all_sources = sources(golden, folder)

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def body(data):
        source = all_sources[data.draw(st.integers(0, len(all_sources) - 1))]
        kinds = st.sampled_from(["bytes", "header", "header", "config"])
        changes = data.draw(st.lists(kinds, min_size=1, max_size=2))
        check(source, folder, changes, data.draw, known)

    body()
    return known


def test_mutated_files_are_refused_or_harmless(golden, tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.io.peft.config.SECONDS", 0.3)
    known = run(golden, tmp_path, FEW)
    assert known["refused"] > 3 * known["accepted"] > 0, known


@pytest.mark.long
def test_ten_thousand_mutated_files(golden, tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.io.peft.config.SECONDS", 0.3)
    known = run(golden, tmp_path, MANY + MANY // 10)  # some mutations change nothing
    print(known)
    assert known["refused"] + known["accepted"] >= MANY, known
    assert known["refused"] > 3 * known["accepted"] > 0, known


def test_the_fuzzer_sees_a_reader_that_does_not_check(golden, tmp_path, monkeypatch):
    """The mutation check: without the checks of modules the same files do harm."""
    monkeypatch.setattr(peft, "check_modules", lambda *_: None)
    with pytest.raises(Exception) as caught:
        run(golden, tmp_path, 10 * FEW, [Phase.generate])  # ends at the first that is seen
    assert not isinstance(caught.value, FormatError)


@pytest.mark.parametrize("bad", ["../../evil", "/etc/passwd", "..", "layer\x00"])
def test_names_that_climb_are_no_modules(golden, tmp_path, bad):
    model = golden["bert"]
    tensors, meta = safetensors_file.read(model.path / "lora" / peft.WEIGHTS)
    key = sorted(tensors)[0]
    tensors[f"{peft_read.ROOT}{bad}.lora_A.weight"] = tensors.pop(key)
    (tmp_path / peft.CONFIG).write_bytes((model.path / "lora" / peft.CONFIG).read_bytes())
    data = joined(*split_of(tensors, meta))
    (tmp_path / peft.WEIGHTS).write_bytes(data)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(FormatError):
        jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def split_of(tensors, meta) -> tuple[dict, bytes]:
    """A file's header and body, names unchecked."""
    header, body = {"__metadata__": meta}, b""
    for name, array in tensors.items():
        span = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        body += array.tobytes()
    return header, body

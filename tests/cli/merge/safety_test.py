"""What a merge may touch: nothing but its target, and of that only what the command wrote."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.cli.merge import replaceable, write
from jlora.cli.merge.base import INDEX, MARKER, Base
from jlora.io import FormatError, safetensors_file

GOLDEN = Path(__file__).parents[3] / "third_party/peft/llama"


def merge(tmp_path, *flags, models=(GOLDEN / "lora",), **changes):
    config = {
        "merge_method": "concat",
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models],
        "out": {"path": "out"},
        **changes,
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    return command.main(["--config", str(tmp_path / "merge.yaml"), *flags])


def state(folder):
    """Every file below a folder with its hash, links by where they point."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink()
        else hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }  # fmt: skip


# --- names in files -----------------------------------------------------------------------------


def hostile(tmp_path, name):
    """A base whose index names a shard `name`, which is the true one, lying outside."""
    (tmp_path / "base").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in ("model.safetensors", "config.json"):
        shutil.copy(GOLDEN / "base" / file, outside / file)
    (tmp_path / "base/link").symlink_to(outside, target_is_directory=True)
    (tmp_path / "base/folder.safetensors").mkdir()
    where = dict.fromkeys(safetensors_file.header(outside / "model.safetensors"), name)
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": where}))
    return outside


@pytest.mark.parametrize("name", [
    "{outside}/model.safetensors", "../outside/model.safetensors", "link/model.safetensors",
    "./../outside/model.safetensors", "C:\\model.safetensors", "", ".", "folder.safetensors",
    "config.json", INDEX, 3,
])  # fmt: skip
def test_a_shard_named_outside_of_the_base_is_neither_read_nor_written(name, tmp_path, capsys):
    outside = hostile(tmp_path, name.format(outside=tmp_path / "outside") if str(name) == name
                      else name)  # fmt: skip
    before = state(tmp_path / "outside"), state(tmp_path / "base")
    status = merge(tmp_path, base_model="base", out={"path": "out", "format": "merged"})
    assert status == 2 and not (tmp_path / "out").exists()
    assert (state(outside), state(tmp_path / "base")) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("expected" in said or "not a regular file" in said)


def test_shards_in_folders_of_the_base_are_written_there(tmp_path):
    (tmp_path / "base/part").mkdir(parents=True)
    shutil.copy(GOLDEN / "base/model.safetensors", tmp_path / "base/part/a.safetensors")
    where = dict.fromkeys(Base(GOLDEN / "base").where, "part/a.safetensors")
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": where}))
    assert merge(tmp_path, base_model="base", out={"path": "out", "format": "merged"}) == 0
    q = "model.layers.0.self_attn.q_proj.weight"
    assert (Base(tmp_path / "out").tensor(q) != Base(tmp_path / "base").tensor(q)).any()


def test_a_pipe_in_the_place_of_a_shard_does_not_hang(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    os.mkfifo(tmp_path / "base/model.safetensors")
    assert merge(tmp_path, base_model="base", out={"path": "out", "format": "merged"}) == 2
    assert "not a regular file" in capsys.readouterr().err


# --- what --overwrite replaces ------------------------------------------------------------------


def base_in(tmp_path):
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    return tmp_path / "base"


def the_adapter(tmp_path):
    shutil.copytree(GOLDEN / "lora", tmp_path / "mine")
    return {"models": (tmp_path / "mine",), "out": {"path": "mine"}}


def the_base(tmp_path):
    return {"base_model": str(base_in(tmp_path)), "out": {"path": "base", "format": "merged"}}


def around_an_input(tmp_path):
    the_adapter(tmp_path / "box")
    return {"models": (tmp_path / "box/mine",), "out": {"path": "box"}}


def a_home(tmp_path):
    (tmp_path / "home/.ssh").mkdir(parents=True)
    (tmp_path / "home/.ssh/id").write_text("key")
    (tmp_path / "home/thesis.tex").write_text("years")
    return {"out": {"path": "home"}}


def another_adapter(tmp_path):
    shutil.copytree(GOLDEN / "lora_rslora", tmp_path / "trained")
    return {"out": {"path": "trained"}}


def a_folder_of_the_base(tmp_path):
    (base_in(tmp_path) / "original").mkdir()
    (tmp_path / "base/original/params.json").write_text("{}")
    return {"base_model": "base", "out": {"path": "base/original", "format": "merged"}}


def a_link(tmp_path):
    a_home(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "home", target_is_directory=True)
    return {"out": {"path": "link"}}


def a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    return {"out": {"path": "link"}}


def a_file(tmp_path):
    (tmp_path / "notes").write_text("notes")
    return {"out": {"path": "notes"}}


def an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return {"out": {"path": "empty"}}


def our_output_with_a_repository(tmp_path):
    assert merge(tmp_path) == 0
    (tmp_path / "out/.git").mkdir()
    (tmp_path / "out/.git/HEAD").write_text("ref")
    return {}


def our_output_that_is_an_input(tmp_path):
    assert merge(tmp_path) == 0
    return {"models": (tmp_path / "out",)}


def our_output_that_an_input_links_to(tmp_path):
    assert merge(tmp_path) == 0
    (tmp_path / "mine").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "mine" / name).symlink_to(tmp_path / "out" / name)
    return {"models": (tmp_path / "mine",)}


def something_where_the_parts_go(tmp_path):
    assert merge(tmp_path) == 0
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/mine").write_text("x")
    return {}


KEPT = (
    the_adapter, the_base, around_an_input, a_home, another_adapter, a_folder_of_the_base, a_link,
    a_dangling_link, a_file, an_empty_folder, our_output_with_a_repository,
    our_output_that_is_an_input, our_output_that_an_input_links_to, something_where_the_parts_go,
)  # fmt: skip


@pytest.mark.parametrize("make", KEPT, ids=lambda f: f.__name__)
def test_overwrite_keeps_what_is_no_output_of_ours(make, tmp_path, capsys):
    (tmp_path / "box").mkdir()
    changes = make(tmp_path)
    capsys.readouterr()
    (tmp_path / "merge.yaml").unlink(missing_ok=True)
    before = state(tmp_path)
    assert merge(tmp_path, "--overwrite", **changes) == 2
    (tmp_path / "merge.yaml").unlink()
    assert state(tmp_path) == before
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("form", ["peft", "orbax", "merged"])
def test_overwrite_replaces_our_outputs_in_every_format(form, tmp_path):
    base = {"base_model": str(GOLDEN / "base")} if form == "merged" else {}
    out = {"path": "out", "format": form}
    assert merge(tmp_path, out=out, **base) == 0
    first = state(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).is_file()
    other = {"out": {"path": "out"}, "models": (GOLDEN / "lora_rslora",)}
    assert merge(tmp_path, "--overwrite", **other) == 0
    assert state(tmp_path / "out") != first and not list(tmp_path.glob(".*"))


def test_an_output_inside_the_base_leaves_the_base_as_it_is(tmp_path):
    before = state(base_in(tmp_path))
    out = {"path": "base/merged", "format": "merged"}
    for flags in ((), ("--overwrite",)):
        assert merge(tmp_path, *flags, base_model="base", out=out) == 0
    inner = {n: h for n, h in state(tmp_path / "base").items() if not n.startswith("merged")}
    assert inner == before
    names = {p.name for p in (tmp_path / "base/merged").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        MARKER,
    }


def test_the_marker_is_not_handed_on_by_a_base_that_the_command_wrote(tmp_path):
    out = {"path": "one", "format": "merged"}
    assert merge(tmp_path, base_model=str(GOLDEN / "base"), out=out) == 0
    assert MARKER not in [p.name for p in Base(tmp_path / "one").rest()]


def test_mutation_a_check_that_lets_pass_loses_files(tmp_path, monkeypatch):
    monkeypatch.setattr(replaceable, "check", lambda folder, inputs: None)
    assert merge(tmp_path, "--overwrite", **a_home(tmp_path)) == 0
    assert not (tmp_path / "home/thesis.tex").exists()


# --- values that are passed on ------------------------------------------------------------------


def with_buffers(tmp_path, **buffers):
    tensors, meta = safetensors_file.read(GOLDEN / "base/model.safetensors")
    (tmp_path / "base").mkdir()
    file = tmp_path / "base/model.safetensors"
    form = {"dtypes": safetensors_file.EVERY_DTYPE, "finite": False}
    safetensors_file.write(file, tensors | buffers, meta, **form)
    return safetensors_file.read(file, **form)[0]


MASK = np.where(np.tri(4, dtype=bool), 0, -np.inf).astype(np.float32)


def test_buffers_that_are_infinite_and_other_dtypes_pass_bit_by_bit(tmp_path):
    """Every dtype of the format; also where all floating weights are cast, but for float8."""
    every = safetensors_file.EVERY_DTYPE.items()
    bits = np.arange(24, dtype=np.uint8)
    times = {**dict.fromkeys(safetensors_file.FLOAT8, 11), "BOOL": 0}  # 11: their NaNs as well
    buffers = {f"of.{k}": (times.get(k, 1) * bits).astype(np.uint8).view(d) for k, d in every}
    old = with_buffers(tmp_path, mask=MASK, **buffers)
    for dtype in (None, "bfloat16"):
        out = {"path": "out", "format": "merged", "dtype": dtype}
        assert merge(tmp_path, "--overwrite", base_model="base", out=out) == 0
        new, _ = safetensors_file.read(
            tmp_path / "out/model.safetensors", dtypes=safetensors_file.EVERY_DTYPE, finite=False
        )
        cast = ("of.F64", "of.F32", "of.F16", "of.BF16", "mask") if dtype else ()
        for name in ("mask", *buffers):
            if name not in cast:
                assert new[name].dtype == old[name].dtype, name
                assert new[name].tobytes() == old[name].tobytes(), name
        np.testing.assert_array_equal(new["mask"].astype(np.float32), MASK)


def test_what_is_changed_or_cast_must_be_finite(tmp_path, capsys):
    q = "model.layers.0.self_attn.q_proj.weight"
    bad = np.full((16, 16), 0.5, np.float32)
    bad[3, 4] = np.nan
    with_buffers(tmp_path, **{q: bad})
    out = {"path": "out", "format": "merged"}
    assert merge(tmp_path, base_model="base", out=out) == 2
    assert f"{q}: got 1 values that are NaN" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "base")
    with_buffers(tmp_path, mask=np.full(3, -3e38, np.float32))
    assert merge(tmp_path, base_model="base", out=out | {"dtype": "float16"}) == 2
    assert "mask: got NaN or infinite values in float16" in capsys.readouterr().err
    assert merge(tmp_path, base_model="base", out=out) == 0


def test_adapters_are_still_refused_where_they_are_not_finite(tmp_path):
    shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
    file = tmp_path / "lora/adapter_model.safetensors"
    tensors, meta = safetensors_file.read(file)
    next(iter(tensors.values()))[0, 0] = np.inf
    safetensors_file.write(file, tensors, meta, finite=False)
    assert merge(tmp_path, models=(tmp_path / "lora",)) == 2
    with pytest.raises(FormatError, match="infinite"):
        safetensors_file.read(file)


def test_write_keeps_a_link_in_its_place(tmp_path):
    """Merged files replace; they never follow a link that lies where they go."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "secret")
    write.safetensors_file.write(tmp_path / "x.safetensors", {"a": MASK}, {}, finite=False)
    assert (tmp_path / "secret").read_text() == "secret"

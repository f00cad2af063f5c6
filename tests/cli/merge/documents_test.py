"""YAML as people write it: a key twice, a byte order mark, what is no YAML."""

import shutil
from pathlib import Path

import pytest
import yaml

from jlora.cli.merge import cache, documents
from jlora.cli.merge import main as command
from jlora.cli.merge.base import Base
from jlora.cli.merge.config import ConfigError
from jlora.io import FormatError, safetensors_file

GOLDEN = Path(__file__).parents[3] / "third_party/peft/llama"


@pytest.mark.parametrize("text, line, key", [
    ("a: 1\nb: 2\na: 3\n", 3, "a"),
    ("a:\n  - b: 1\n    c: 2\n    b: 1\n", 4, "b"),
    ("a: {x: 1, x: 2}\n", 1, "x"),
])  # fmt: skip
def test_a_key_twice_is_an_error_that_names_both_lines(text, line, key, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    first = f"m\\.yaml: line {line}: got the key '{key}' twice.*first in line"
    with pytest.raises(ConfigError, match=first):
        documents.read(tmp_path / "m.yaml")
    assert yaml.safe_load(text) is not None  # what everybody else does


def test_keys_of_different_mappings_and_kinds_may_be_equal(tmp_path):
    text = "a: &x {b: 1}\nc: {b: 2}\nd: {<<: *x, b: 3}\n1: one\n'1': text\n"
    (tmp_path / "m.yaml").write_text(text)
    assert documents.read(tmp_path / "m.yaml") == yaml.safe_load(text)


def test_a_byte_order_mark_is_left_aside(tmp_path):
    (tmp_path / "m.yaml").write_bytes("a: ä\n".encode("utf-8-sig"))
    assert documents.read(tmp_path / "m.yaml") == {"a": "ä"}


@pytest.mark.parametrize("data", [
    b"a: [", b"\xff\xfea", b"[" * 5000, b"a: !!python/object:x {}", b"a: [1,\nb: {", b"a:\n\tb: 1"
])  # fmt: skip
def test_what_is_no_yaml_is_one_line(data, tmp_path, capsys):
    (tmp_path / "m.yaml").write_bytes(data)
    assert command.main(["--config", str(tmp_path / "m.yaml")]) == 2
    message = capsys.readouterr().err
    assert "m.yaml: not YAML" in message and message.count("\n") == 1


def test_several_documents_are_several_merges(tmp_path):
    (tmp_path / "m.yaml").write_text("name: one\n---\nmerge_method: linear\n")
    with pytest.raises(ConfigError, match=r"got 2 documents .* expected one merge in a file"):
        documents.read(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("---\na: 1\n...\n")
    assert documents.read(tmp_path / "m.yaml") == {"a": 1}


def test_json_of_bases_and_adapters_may_have_a_byte_order_mark(tmp_path):
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
    for file in (tmp_path / "base/config.json", tmp_path / "lora/adapter_config.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Base(tmp_path / "base").config()["model_type"] == "llama"
    config = {"merge_method": "concat", "models": [{"model": "lora"}], "base_model": "base",
              "out": {"path": "out", "format": "merged"}}  # fmt: skip
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    assert command.main(["--config", str(tmp_path / "m.yaml")]) == 0
    with pytest.raises(FormatError, match="duplicate key"):
        safetensors_file.parse_json("x", b'\xef\xbb\xbf{"a": 1, "a": 2}')


def test_only_the_command_keeps_compiled_programs(tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(cache.jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    assert cache.jax.config.jax_compilation_cache_dir is None  # after all merges of this file
    cache.keep_compiled()
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "cache/compiled")
    assert (tmp_path / "cache/compiled").stat().st_mode & 0o777 == 0o700
    settings.clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "file"))
    cache.keep_compiled()
    assert settings == {}

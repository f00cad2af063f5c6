"""`jlora inspect --check-names`: what fits, what matches nothing, and the nearest names."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jlora.cli import inspect
from jlora.io import safetensors_file, tunix
from tests.golden import make_stacks
from tests.io.stacks_test import WEIGHTS, read, written

TREE = make_stacks.FOLDER / "tunix-gemma3.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    _, leaves, _ = read("tunix-gemma3")
    written(path, leaves, tunix())
    return path, leaves


def checked(capsys, *words, status):
    got = inspect.main([str(w) for w in words])
    out = capsys.readouterr()
    assert got == status, out
    return out.out + out.err


def trees(leaves, folder):
    """The same tree in each format."""
    safetensors_file.write(
        folder / "p.safetensors", {k: np.asarray(v) for k, v in leaves.items()}, {}
    )
    nested: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        at = nested
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = leaf
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", nested)
    return [TREE, folder / "p.safetensors", folder / "orbax"]


def test_an_adapter_that_fits_in_every_format_of_the_tree(adapter, tmp_path, capsys):
    path, leaves = adapter
    for tree in trees(leaves, tmp_path):
        text = checked(capsys, path, "--check-names", tree, "--names", "tunix", status=0)
        assert "14 of 14 modules of the file have a leaf; 0 differ" in text
        assert "rules that match no leaf:\n  layers/(?P<i>\\d+)/attn/([qkv])_proj/w" in text
        assert "matrices without a rule" not in text


def test_what_matches_nothing_is_named_with_what_is_near(adapter, tmp_path, capsys):
    path, _ = adapter
    rules = {r"layers/(?P<i>\d+)/attn/q_einsum/w": ["model.layer.{i}.self_attn.q_proj", "oio"],
             r"layers/(?P<i>\d+)/mlp/down_proj/kernel": ["model.layers.{i}.mlp.down_proj", "oi"],
             r"layers/(?P<i>\d+)/attn/kv_einsum/ww": "model.layers.{i}.x"}  # fmt: skip
    (tmp_path / "names.yaml").write_text(json.dumps(rules))
    words = (path, "--check-names", TREE, "--names", tmp_path / "names.yaml")
    text = checked(capsys, *words, status=1)
    assert "model.layers.0.self_attn.q_proj; nearest: ['model.layer.0.self_attn.q_proj'" in text
    assert "down_proj: lora_A.weight has 20 inputs, layers/0/mlp/down_proj/kernel/value" in text
    assert "kv_einsum/ww; nearest: ['layers/" in text
    assert "layers/0/mlp/gate_proj/kernel/value (16, 20); nearest: [" in text
    data = json.loads(checked(capsys, *words, "--json", status=1))
    assert len(data["lost"]) == 12 and len(data["differ"]) == 4


def test_bad_input_is_one_error(adapter, tmp_path, capsys):
    path, _ = adapter
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "row.json").write_text('{"a": [1, 2]}')
    (tmp_path / "empty").mkdir()
    for tree, why in (
        ("nowhere", "no such file"),
        (tmp_path / "list.json", "got list, expected a JSON object"),
        (tmp_path / "row.json", "a: got [1, 2], expected [dtype, *shape]"),
        (tmp_path / "empty", "got no arrays, expected a tree's checkpoint"),
        (path / WEIGHTS.replace("safetensors", "bin"), "no such file"),
    ):
        assert why in checked(capsys, path, "--check-names", tree, "--names", "tunix", status=2)
    assert "expected both" in checked(capsys, path, "--names", "tunix", status=2)
    two = tmp_path / "two.json"
    two.write_text(json.dumps({"a/kernel": ["f", 2, 2], "b/kernel": ["f", 2, 2]}))
    (tmp_path / "n.yaml").write_text(r"'\w/kernel': m")
    text = checked(capsys, path, "--check-names", two, "--names", tmp_path / "n.yaml", status=2)
    assert "both called 'm'" in text


def test_a_kohya_file_has_flat_names(adapter, tmp_path, capsys):
    from jlora import io

    path, leaves = adapter
    flat = tmp_path / "x.safetensors"
    io.save_kohya(flat, io.load_peft(path, tunix(), leaves), tunix())
    text = checked(capsys, flat, "--check-names", TREE, "--names", "tunix", status=0)
    assert "14 of 14 modules" in text

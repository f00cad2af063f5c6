"""Slices whose layers move: what is written and refused; values by mergekit are mergekit_test's."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.cli.merge import moved
from jlora.cli.merge.base import INDEX, Base
from jlora.io import safetensors_file

MODELS = Path(__file__).parents[3] / "third_party/mergekit/models"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def job(tmp_path):
    """job(slices, edit, **data) runs them on copies of the models that `edit` has changed."""
    for name in ("a", "b", "base", "lora_a"):
        shutil.copytree(MODELS / name, tmp_path / name)

    def run(slices, *flags, edit=None, method="passthrough", **data):
        if edit is not None:
            edit(tmp_path)
        made = [
            {"sources": [{"model": m, "layer_range": list(span)} for m, *span in one]}
            for one in slices
        ]
        data = {"merge_method": method, "slices": made, **data}
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(data))
        argv = ["--config", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "out"), *flags]
        return command.main(argv), tmp_path / "out"

    return run


def rewritten(name, change):
    """An edit: the tensors of a model changed by a function."""

    def edit(folder):
        path = folder / name / "model.safetensors"
        safetensors_file.write(path, change(safetensors_file.read(path)[0]), {"format": "pt"})

    return edit


def settings(**changes):
    """An edit: fields of every model's `config.json`."""

    def edit(folder):
        for name in "ab":
            path = folder / name / "config.json"
            data = json.loads(path.read_text())
            more = {key: value[name] for key, value in changes.items()}
            path.write_text(json.dumps(data | more))

    return edit


TWO = [[("a", 0, 2)], [("b", 1, 3)]]


@pytest.mark.parametrize("size", [2**32, 4000])
def test_layers_are_those_of_their_models_bit_by_bit(size, job, monkeypatch):
    """In one file, and in several with their index; other fields of the configuration stay."""
    monkeypatch.setattr(moved, "FILE_BYTES", size)
    kinds = settings(layer_types={"a": ["x", "y", "z"], "b": ["u", "v", "w"]})
    status, out = job(TWO, edit=kinds)
    assert status == 0 and (out / INDEX).exists() == (size == 4000)
    got, a, b = (Base(out.parent / name) for name in ("out", "a", "b"))
    assert (len(got.files) > 1) == (size == 4000)
    for new, (model, old) in enumerate(((a, 0), (a, 1), (b, 1), (b, 2))):
        np.testing.assert_array_equal(got.tensor(Q.format(new)), model.tensor(Q.format(old)))
    np.testing.assert_array_equal(got.tensor(TABLE), a.tensor(TABLE))
    np.testing.assert_array_equal(got.tensor(HEAD), b.tensor(HEAD))
    assert len(got.shapes) == 4 * 9 + 3
    config, old = (json.loads((f / "config.json").read_text()) for f in (out, out.parent / "a"))
    assert config == old | {"num_hidden_layers": 4, "layer_types": ["x", "y", "v", "w"]}
    assert (out / "tokenizer.json").read_bytes() == (out.parent / "a/tokenizer.json").read_bytes()


def test_the_dry_run_says_where_layers_are_from(job, capsys):
    status, out = job(TWO, "--dry_run")
    said = capsys.readouterr().out
    assert status == 0 and not out.exists()
    for words in ("layers        4", "0-1: 0-1 of ", "2-3: 1-2 of ", "39 of 39 are merged"):
        assert words in said, said


def tied(folder):
    settings(tie_word_embeddings={"a": True, "b": True})(folder)


REFUSED = {
    "a layer that is not there": ([[("a", 0, 2)], [("b", 2, 5)]], {}, "which has 3"),
    "no layers": ([[("a", 2, 2)]], {}, "expected [start, stop] of at least one layer"),
    "before the first": ([[("a", -1, 2)]], {}, "expected [start, stop] of at least one layer"),
    "of unequal number": ([[("a", 0, 2), ("b", 0, 1)]], {"method": "linear"},
                          "expected as many layers as in [0, 2]"),
    "sources": ([[("a", 0, 2), ("b", 0, 2)], [("a", 1, 2)]], {"method": "linear"},
                "slices[1].sources: got 1, expected 2 as in slices[0]"),
    "adapters": ([[("lora_a", 1, 3)]], {"base_model": "base", "out": {"format": "merged"}},
                 "expected checkpoints"),
    "other base": ([[("a", 0, 2), ("b", 0, 2)]], {"method": "ties", "base_model": "base"},
                   "base_model: got"),
    "tied": (TWO, {"edit": tied}, "the last slice has the output layer"),
    "shape": (TWO, {"edit": rewritten("b", lambda t: t | {Q.format(1): np.ones((9, 8), "f4")})},
              "got (9, 8), expected (8, 8)"),
    "dtype": (TWO, {"edit": rewritten("b", lambda t: {k: v.astype(jnp.bfloat16)
                                                      for k, v in t.items()})},
              "got bfloat16, expected float32"),
    "no number of layers": (TWO, {"edit": settings(num_hidden_layers={"a": None, "b": None})},
                            "expected the number of layers"),
    "a list that is not of layers": (TWO, {"edit": settings(layer_types={"a": [1, 2, 3],
                                                                         "b": [1]})},
                                     "expected a list with an entry for each layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_write_nothing(name, job, capsys):
    slices, changes, text = REFUSED[name]
    status, out = job(slices, **changes)
    said = capsys.readouterr().err
    assert status == 2 and text in said and said.count("\n") == 1, said
    assert not out.exists() and not list(out.parent.glob(".*"))


def test_models_of_later_slices_are_no_target(job, capsys):
    status, out = job(TWO)
    assert status == 0
    shutil.rmtree(out.parent / "b")
    out.rename(out.parent / "b")  # an output of ours, and read by the second slice
    status = command.main(["--config", str(out.parent / "merge.yaml"), "--overwrite",
                           "--out", str(out.parent / "b")])  # fmt: skip
    assert status == 2 and "holds the input" in capsys.readouterr().err
    assert (out.parent / "b/model.safetensors").exists()

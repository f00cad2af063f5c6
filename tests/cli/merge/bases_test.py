"""`missing: zero` puts adapters of one base together, and no others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.io import safetensors_file
from jlora.merging.engine.options import lookup

LLAMA = Path(__file__).parents[3] / "third_party/peft/llama"


def lora(folder, modules, base=None):
    """A LoRA of rank 1 of square modules, by hand."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": modules,
              "base_model_name_or_path": base}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module in modules:
        for kind, shape in (("A", (1, 4)), ("B", (4, 1))):
            key = f"base_model.model.{module}.lora_{kind}.weight"
            tensors[key] = np.ones(shape, np.float32)
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


GPT2, Q, V = "transformer.h.0.attn.c_attn", "model.layers.0.q_proj", "model.layers.0.v_proj"
CASES = (
    (([Q], "meta-llama/Llama-2-7b"), ([GPT2], "openai/gpt2"), "expected one of 'llama-2-7b'"),
    (([Q], None), ([GPT2], None), "no site in common"),
    (([Q], "llama"), ([GPT2], None), "no site in common"),
    (([Q, V], "meta-llama/Llama-2-7b"), ([Q], "huggyllama/llama-7b"), "got an adapter of"),
    (([Q], "meta-llama/Llama-2-7b"), ([V], "/data/llama-2-7B/"), None),
    (([Q, V], None), ([Q], None), None),
    (([Q, V], None), ([V], "llama"), None),
)


def merge(tmp_path, **changes):
    config = {"merge_method": "concat", "models": [{"model": "a"}, {"model": "b"}],
              "missing": "zero", "out": {"path": "out"}, **changes}  # fmt: skip
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    return command.main(["--config", str(tmp_path / "m.yaml")])


@pytest.mark.parametrize("one, two, text", CASES)
def test_adapters_of_other_bases_are_refused(one, two, text, tmp_path, capsys):
    lora(tmp_path / "a", *one)
    lora(tmp_path / "b", *two)
    status = merge(tmp_path)
    assert status == (2 if text else 0)
    assert (tmp_path / "out").exists() == (text is None)
    assert text is None or text in capsys.readouterr().err


def test_a_base_that_has_all_sites_says_so(tmp_path):
    lora(tmp_path / "a", [Q], "one")
    lora(tmp_path / "b", [V], "two")
    (tmp_path / "base").mkdir()
    weights = {f"{m}.weight": np.ones((4, 4), np.float32) for m in (Q, V)}
    safetensors_file.write(tmp_path / "base/model.safetensors", weights, {"format": "pt"})
    assert merge(tmp_path, base_model="base") == 0


def test_sites_of_all_are_enough_whatever_the_base_is_called(tmp_path):
    lora(tmp_path / "a", [Q], "meta-llama/Llama-2-7b")
    lora(tmp_path / "b", [Q], "/data/my-copy")
    assert merge(tmp_path, missing="error") == 0


@pytest.mark.parametrize(
    "name, text",
    [
        ("svd", "truncated"),
        ("tie", "ties"),
        ("dare_tie", "dare_ties"),
    ],
)
def test_an_unknown_method_is_told_what_to_use(name, text, tmp_path, capsys):
    shutil.copytree(LLAMA / "lora", tmp_path / "a")
    assert merge(tmp_path, merge_method=name, models=[{"model": "a"}]) == 2
    assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"merge method: got '{name}', expected one of"):
        lookup(name)


@pytest.mark.parametrize("rank", [4.5, 0, -1, True, "4", [1, 2.5]])
def test_a_rank_is_a_whole_number(rank, tmp_path, capsys):
    shutil.copytree(LLAMA / "lora", tmp_path / "a")
    changes = {"merge_method": "truncated", "parameters": {"rank": rank}}
    assert merge(tmp_path, models=[{"model": "a"}], **changes) == 2
    assert "rank" in capsys.readouterr().err and not (tmp_path / "out").exists()

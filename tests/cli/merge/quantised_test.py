"""Quantised bases: LLM.int8 as bitsandbytes wrote it, all else refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.cli.merge import quantised
from jlora.cli.merge.base import INDEX, Base
from jlora.cli.merge.config import PLAIN
from jlora.io import safetensors_file

ROOT = Path(__file__).parents[3] / "third_party"
INT8, LORA = ROOT / "bitsandbytes/llama_int8", ROOT / "peft/llama/lora"
Q = "model.layers.0.self_attn.q_proj"
EVERY = {"dtypes": safetensors_file.EVERY_DTYPE, "finite": False}


def merge(tmp_path, model=LORA, base=INT8, form="merged", dtype=None, weight=0.5):
    config = {
        "merge_method": "concat", "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": weight}}],
        "out": {"path": "out", "format": form, "dtype": dtype},
    }  # fmt: skip
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    return command.main(["--config", str(tmp_path / "merge.yaml"), "--overwrite"])


def read(folder):
    return safetensors_file.read(folder / "model.safetensors", **EVERY)[0]


def values():
    """The weights as bitsandbytes reads them."""
    return safetensors_file.read(INT8 / "dequantised.safetensors")[0]


def deltas(folder=LORA):
    """PEFT's definition: alpha / r of B A, by tensor of the base."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = safetensors_file.read(folder / "adapter_model.safetensors")[0]
    out = {}
    for name, a in found.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = found[name.replace("lora_A", "lora_B")]
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            out[f"{module}.weight"] = alpha / a.shape[0] * b.astype(float) @ a
    return out


def test_codes_and_scales_are_the_weights_of_bitsandbytes():
    base, want = Base(INT8), values()
    assert {f"{m}.weight" for m in base.quantised} == set(want) and len(want) == 21
    for name, expected in want.items():
        got = base.values(name, base.tensor(name))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_merged_into_what_the_codes_mean_and_only_there(dtype, tmp_path):
    assert merge(tmp_path, dtype=dtype) == 0
    old, new, want, added = read(INT8), read(tmp_path / "out"), values(), deltas()
    assert len(added) == 6
    kind = np.dtype(dtype or "float16")  # the model's, by config.json
    for name, d in added.items():
        assert new[name].dtype == kind
        gap = np.abs(new[name] - (want[name] + 0.5 * d)).max()
        assert gap <= (1e-6 if dtype else 1e-3) * np.abs(want[name]).max()
        assert np.abs(0.5 * d).max() > 20 * gap
    gone = {f"{n.removesuffix('.weight')}.{k}" for n in added for k in ("SCB", "weight_format")}
    assert set(new) == set(old) - gone
    for name in set(new) - set(added):
        if dtype and old[name].dtype == np.float16:
            assert new[name].dtype == kind
        else:  # codes, scales and, without a dtype, all else
            assert new[name].dtype == old[name].dtype
            assert new[name].tobytes() == old[name].tobytes()
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    skipped = set(told["llm_int8_skip_modules"])
    codes = {n.removesuffix(".weight") for n in new if new[n].dtype == np.int8}
    assert {n.removesuffix(".weight") for n in added} | {"lm_head"} <= skipped
    assert not skipped & codes and told["load_in_8bit"] is True


def test_shards_that_keep_scales_apart_and_their_index(tmp_path):
    tensors = read(INT8)
    (tmp_path / "base").mkdir()
    shutil.copy(INT8 / "config.json", tmp_path / "base/config.json")
    where = {n: "b.safetensors" if n.endswith("SCB") else "a.safetensors" for n in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        part = {n: t for n, t in tensors.items() if where[n] == file}
        safetensors_file.write(tmp_path / "base" / file, part, {"format": "pt"}, **EVERY)
    told = {"metadata": {"x": 1}, "weight_map": where}
    (tmp_path / "base" / INDEX).write_text(json.dumps(told))
    assert merge(tmp_path, base=tmp_path / "base") == 0
    new = Base(tmp_path / "out")  # index and shards agree
    assert f"{Q}.SCB" not in new.where and new.where[f"{Q}.weight"] == "a.safetensors"
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {"x": 1}


def test_dora_reads_the_length_of_the_true_columns(tmp_path):
    """Into an adapter and into weights, alongside the formula in float64."""
    folder = ROOT / "peft/llama/dora"
    tensors = safetensors_file.read(folder / "adapter_model.safetensors")[0]
    name = next(n for n in tensors if n.endswith("lora_magnitude_vector"))
    module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
    assert merge(tmp_path, model=folder, weight=1.0, dtype="float32") == 0
    w = values()[f"{module}.weight"] + deltas(folder)[f"{module}.weight"]
    want = w / np.linalg.norm(w, axis=1, keepdims=True) * tensors[name][:, None]
    got = read(tmp_path / "out")[f"{module}.weight"]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_mutation_raw_codes_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised, "dequantised", lambda codes, scales: codes.astype(np.float32))
    with pytest.raises(AssertionError):
        test_merged_into_what_the_codes_mean_and_only_there("float32", tmp_path)


def test_when_all_are_changed_nothing_is_quantised_any_longer(tmp_path):
    tensors = {n: t for n, t in read(INT8).items() if n.startswith(Q) or "self_attn" not in n}
    tensors = {n: t for n, t in tensors.items() if n.startswith(Q) or t.dtype == np.float16}
    (tmp_path / "base").mkdir()
    shutil.copy(INT8 / "config.json", tmp_path / "base/config.json")
    file = tmp_path / "base/model.safetensors"
    safetensors_file.write(file, tensors, {"format": "pt"}, **EVERY)
    shutil.copytree(LORA, tmp_path / "lora")
    config = json.loads((LORA / "adapter_config.json").read_text()) | {"target_modules": [Q]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    factors, meta = safetensors_file.read(LORA / "adapter_model.safetensors")
    factors = {n: t for n, t in factors.items() if Q in n}
    safetensors_file.write(tmp_path / "lora/adapter_model.safetensors", factors, meta)
    assert merge(tmp_path, model=tmp_path / "lora", base=tmp_path / "base") == 0
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


F32, U8, I32 = np.float32, np.uint8, np.int32
F8 = safetensors_file.FLOAT8["F8_E4M3"]
LAYOUTS = {
    "4-bit": ({"weight": (U8, (128, 1)), "weight.absmax": (F32, (4,)), "weight.quant_map":
              (F32, (16,)), "weight.quant_state.bitsandbytes__nf4": (U8, (80,))}, "4-bit"),
    "gptq": ({"qweight": (I32, (2, 16)), "qzeros": (I32, (1, 2)), "scales": (F32, (1, 16)),
              "g_idx": (I32, (16,))}, "GPTQ"),
    "awq": ({"qweight": (I32, (16, 2)), "qzeros": (I32, (1, 2)), "scales": (F32, (1, 16))}, "AWQ"),
    "deepseek": ({"weight": (F8, (16, 16)), "weight_scale_inv": (F32, (1, 1))}, "scaled fp8"),
    "fp8": ({"weight": (F8, (16, 16)), "weight_scale": (F32, (1,))}, "with a scale"),
    "packed": ({"weight_packed": (I32, (16, 2)), "weight_scale": (F32, (16, 1))}, "compressed"),
    "int8": ({"weight": (np.int8, (16, 16))}, "int8 weights without a scale"),
    "uint16": ({"weight": (np.uint16, (16, 16))}, "uint16 weights without a scale"),
    "scales": ({"weight": (np.int8, (16, 16)), "SCB": (F32, (8,))}, "expected int8 and"),
    "order": ({"weight": (np.int8, (16, 16)), "SCB": (F32, (16,)), "weight_format": (U8, ())},
              "expected 0 (row)"),
    "plain fp8": ({"weight": (F8, (16, 16))}, "say out.dtype"),
}  # fmt: skip


def with_layout(tmp_path, layout):
    tensors, meta = safetensors_file.read(ROOT / "peft/llama/base/model.safetensors")
    del tensors[f"{Q}.weight"]
    made = {f"{Q}.{k}": np.ones(shape, kind) for k, (kind, shape) in layout.items()}
    (tmp_path / "base").mkdir()
    file = tmp_path / "base/model.safetensors"
    safetensors_file.write(file, tensors | made, meta, **EVERY)
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_refused_by_name_and_pass_where_they_are_left_alone(
    name, tmp_path, capsys
):
    layout, text = LAYOUTS[name]
    made = with_layout(tmp_path, layout)
    assert merge(tmp_path, base=tmp_path / "base") == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert text in said and Q in said and said.count("\n") == 1, said
    factors, meta = safetensors_file.read(LORA / "adapter_model.safetensors")
    factors = {n: t for n, t in factors.items() if Q not in n}
    shutil.copytree(LORA, tmp_path / "lora")
    safetensors_file.write(tmp_path / "lora/adapter_model.safetensors", factors, meta)
    config = json.loads((LORA / "adapter_config.json").read_text())
    others = sorted({n.split(".lora_")[0].removeprefix("base_model.model.") for n in factors})
    text = json.dumps(config | {"target_modules": others})
    (tmp_path / "lora/adapter_config.json").write_text(text)
    left = {"model": tmp_path / "lora", "base": tmp_path / "base"}
    for dtype in (None, "bfloat16"):
        assert merge(tmp_path, dtype=dtype, **left) == 0
        new = read(tmp_path / "out")
        for key, array in made.items():
            assert new[key].dtype == array.dtype and new[key].tobytes() == array.tobytes()


def test_plain_fp8_is_merged_into_a_dtype_that_is_given(tmp_path):
    with_layout(tmp_path, LAYOUTS["plain fp8"][0])
    assert merge(tmp_path, base=tmp_path / "base", dtype="float32") == 0
    got = read(tmp_path / "out")[f"{Q}.weight"]
    np.testing.assert_allclose(got, 1 + 0.5 * deltas()[f"{Q}.weight"], atol=1e-6)


def test_adapters_alone_need_no_numbers_of_the_base(tmp_path):
    """LoRA to LoRA reads shapes, and those of codes are the same."""
    assert merge(tmp_path, form="peft") == 0
    sites = Base(INT8).params()
    assert sites[Q]["kernel"].dtype == np.float32 and PLAIN.module(f"{Q}/kernel") == Q

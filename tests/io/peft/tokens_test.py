"""Rows of a table that PEFT trains alongside LoRA: its golden adapter, and what is refused."""

import json
import shutil

import chex
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, safetensors_file
from jlora.io.peft import tokens as peft_tokens
from jlora.methods.selective.trainable_tokens import TrainableTokens
from tests.io.shared import error

TABLE = "embed_tokens/embedding"
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def case(golden):
    model = golden["llama"]
    return model, model.path / "lora_tokens"


def load(case, path=None):
    model, golden_path = case
    return jl.io.load_peft(path or golden_path, model.names, model.params, layout="in_out")


def check_value(case):
    model, path = case
    want = safetensors_file.read(path / "expected.safetensors")[0]["expected"]
    adapter = load(case)
    assert error(model.expected, want) > 1e-3
    assert dict((s.path, m) for s, m in adapter.sites)[TABLE] == TrainableTokens((9, 1, 4))
    assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) <= 1e-5
    assert error(model.fn(jl.merge(model.params, adapter), *model.args), want) <= 1e-5


def test_it_computes_what_peft_computes(case):
    check_value(case)


def test_it_goes_back_bitwise(case, tmp_path):
    model, path = case
    adapter = load(case)
    jl.io.save_peft(tmp_path, adapter, model.names)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (path / name).read_bytes()
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["trainable_token_indices"] == {"model.embed_tokens": [9, 1, 4]}
    back = load(case, tmp_path)
    assert back.sites == adapter.sites
    chex.assert_trees_all_equal(adapter, back)
    assert jl.io.peft_extras(tmp_path) == {}


def edited(case, folder, tokens, change=None):
    path = shutil.copytree(case[1], folder / f"{len(list(folder.iterdir()))}")
    config = json.loads((path / "adapter_config.json").read_text())
    config["trainable_token_indices"] = tokens
    (path / "adapter_config.json").write_text(json.dumps(config))
    if change:
        tensors, meta = safetensors_file.read(path / "adapter_model.safetensors")
        change(tensors)
        safetensors_file.write(path / "adapter_model.safetensors", tensors, meta)
    return path


def test_a_list_means_the_one_table(case, tmp_path):
    assert load(case, edited(case, tmp_path, [9, 1, 4])).sites == load(case).sites


@pytest.mark.parametrize(
    ("tokens", "change", "why"),
    [
        (None, None, "for the rows of"),
        ("all", None, "for the rows of"),
        ({}, None, "rows are of"),
        ({"embed_tokens": [9, 1]}, None, r"has shape \[3, 16\], expected \[2, 16\]"),
        ({"embed_tokens": [9, 1, 32]}, None, "expected rows below 32"),
        ({"embed_tokens": [9, 1, -4]}, None, "expected rows below 32"),
        ({"embed_tokens": [9, 1, True]}, None, "expected rows below 32"),
        ({"embed_tokens": [9, 1, 1]}, None, "expected distinct rows"),
        ({"lm_head": [9, 1, 4]}, None, "expected one table"),
        ({"embed_tokens": [9, 1, 4]}, lambda t: t.pop(KEY), "expected one table"),
        (
            {"q_proj": [9, 1, 4]},
            lambda t: t.update(
                {KEY.replace("embed_tokens", "layers.0.self_attn.q_proj"): t.pop(KEY)}
            ),
            "no embedding table",
        ),
    ],
)
def test_rows_and_numbers_that_do_not_fit_are_refused(case, tmp_path, tokens, change, why):
    with pytest.raises(FormatError, match=why):
        load(case, edited(case, tmp_path, tokens, change))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_real_peft_reads_what_we_write(case, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, path = case
    jl.io.save_peft(tmp_path, load(case), model.names)
    base = transformers.LlamaForCausalLM.from_pretrained(model.path / "base")
    module = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    state, _ = safetensors_file.read(model.path / "base.safetensors")
    inputs = {k: torch.from_numpy(state[k]) for k in ("input_ids", "attention_mask")}
    want = safetensors_file.read(path / "expected.safetensors")[0]["expected"]
    with torch.no_grad():
        assert error(module(**inputs)[0].numpy(), want) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_rows_alone_are_those_of_real_peft(case, tmp_path):
    """TRAINABLE_TOKENS: PEFT's file read, computed, back bitwise; and ours moved, in PEFT."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, _ = case
    state, _ = safetensors_file.read(model.path / "base.safetensors")
    inputs = {k: torch.from_numpy(state[k]) for k in ("input_ids", "attention_mask")}
    name, theirs, ours = "adapter_model.safetensors", tmp_path / "theirs", tmp_path / "ours"

    def outputs(wrap):
        base = transformers.LlamaForCausalLM.from_pretrained(model.path / "base")
        module = wrap(base).eval()
        with torch.no_grad():
            return module, module(**inputs)[0].numpy()

    def fresh(base):
        config = peft.TrainableTokensConfig(token_indices=[9, 1, 4])
        tuned, generator = peft.get_peft_model(base, config), torch.Generator().manual_seed(0)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator)
        return tuned

    module, want = outputs(fresh)
    module.save_pretrained(theirs)
    adapter = load(case, theirs)
    assert adapter.sites[0][1] == TrainableTokens((9, 1, 4)) and len(adapter.sites) == 1
    assert error(model.expected, want) > 1e-3
    assert error(model.fn(jl.merge(model.params, adapter), *model.args), want) <= 1e-5
    jl.io.save_peft(ours, adapter, model.names)
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    moved = adapter.replace(trainable={TABLE: {"rows": -adapter.trainable[TABLE]["rows"]}})
    jl.io.save_peft(ours, moved, model.names)
    _, want = outputs(lambda base: peft.PeftModel.from_pretrained(base, ours))
    assert error(model.fn(jl.merge(model.params, moved), *model.args), want) <= 1e-5
    config = json.loads((ours / "adapter_config.json").read_text())
    for ids, why in (
        ([9, 1], r"shape \[3, 16\]"),
        ([9, 1, 99], "below 32"),
        ("9", "token_indices"),
    ):
        (ours / "adapter_config.json").write_text(json.dumps({**config, "token_indices": ids}))
        with pytest.raises(FormatError, match=why):
            load(case, ours)


def test_mutation_rows_that_are_added_are_seen(case, monkeypatch):
    good = peft_tokens._read

    def added(path, site, ids, rows):
        base = np.asarray(case[0].params["embed_tokens"]["embedding"])[np.asarray(ids)]
        return good(path, site, ids, rows + base)

    monkeypatch.setattr(peft_tokens, "_read", added)
    with pytest.raises(AssertionError):
        check_value(case)

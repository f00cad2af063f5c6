"""Tied tables: the defaults of the real transformers, and real models merged alongside PEFT's."""

import json
import logging

import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.cli.merge.tied import ENCODERS, SEPARATE, TIED, tied

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
configurations = pytest.importorskip("transformers.models.auto.configuration_auto")

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT: that tables are tied, or saved too


def test_the_defaults_are_those_of_the_installed_transformers():
    """Of all types that both know, by the classes; those that the release adds are unknown here."""
    types, seen = configurations.CONFIG_MAPPING, {True: set(), False: set()}
    for kind in types.keys():
        default = getattr(types[kind], "tie_word_embeddings", None)
        if kind in (TIED if default is False else SEPARATE if default is True else ()):
            default = types[kind]().tie_word_embeddings  # some set it when they are made
        if isinstance(default, bool) and kind in TIED | SEPARATE:
            seen[default].add(kind)
    assert not seen[True] & SEPARATE and not seen[False] & TIED
    assert len(seen[True]) > 150 and len(seen[False]) > 150
    assert not TIED & SEPARATE
    assert {"gemma", "gpt2", "opt", "bert", "t5", "bloom", "falcon", "gemma3_text"} <= TIED
    assert {"llama", "mistral", "qwen2", "gpt_neox", "phi"} <= SEPARATE


def test_encoders_are_the_masked_language_models_of_transformers():
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    known = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    both = set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    assert {"bert", "roberta", "modernbert"} <= ENCODERS <= known - both


LM = {"architectures": ["XForCausalLM"]}
CASES = (
    ({}, None),
    ({**LM, "model_type": "gpt2", "vocab_size": 9}, {9}),
    ({**LM, "model_type": "gpt2", "vocab_size": 9, "tie_word_embeddings": False}, None),
    ({**LM, "model_type": "llama", "vocab_size": 9}, None),
    ({**LM, "model_type": "llama", "vocab_size": 9, "tie_word_embeddings": True}, {9}),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, set()),
    ({"model_type": "llava", "text_config": {"model_type": "gemma", "vocab_size": 9}}, {9}),
    ({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 9}}, None),
    ({"model_type": "x", "text_config": {"vocab_size": 9, "tie_word_embeddings": True}}, {9}),
    ({"model_type": "of nobody", "vocab_size": 9}, {9}),
    ({"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 9}, None),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 9}, {9}),
    ({"model_type": "gpt2", "architectures": ["GPT2Model"], "vocab_size": 9}, {9}),
    ({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}, None),
)


@pytest.mark.parametrize("config, rows", CASES)
def test_configurations(config, rows):
    found = tied(config, ["model.embed.weight"])
    assert (found and set(found.rows)) == rows


def test_an_unknown_type_with_an_output_layer_of_its_own_is_not_tied():
    assert tied({"model_type": "of nobody"}, ["model.embed.weight", "lm_head.weight"]) is None
    assert tied({"model_type": "gpt2"}, ["wte.weight", "lm_head.weight"]) is not None


# --- real models --------------------------------------------------------------------------------

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 12, "max_position_embeddings": 16}  # fmt: skip


def gpt2():
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config), "wte"


def opt():
    config = transformers.OPTConfig(**SMALL, ffn_dim=12, word_embed_proj_dim=8)
    return transformers.OPTForCausalLM(config), "embed_tokens"


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "word_embeddings"


def gemma():
    config = transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=4)
    return transformers.GemmaForCausalLM(config), "embed_tokens"


def nested():
    """Idefics 3 with a Gemma inside: its `text_config` tells."""
    inner = {**SMALL, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 4}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 4,
              "num_attention_heads": 2, "patch_size": 2}  # fmt: skip
    config = transformers.Idefics3Config(text_config=inner, vision_config=vision, image_token_id=19,
                                         scale_factor=1, tie_word_embeddings=True)  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config), "embed_tokens"


@pytest.mark.parametrize("make", [gpt2, opt, bert, gemma, nested], ids=lambda f: f.__name__)
def test_tables_of_models_that_leave_it_out_are_refused_and_go_to_peft(make, tmp_path, capsys):
    """As transformers 4 writes `config.json`; the PEFT output gives the logits of PEFT itself."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model, table = make()
    model = model.eval()
    model.save_pretrained(tmp_path / "base")
    whole = (tmp_path / "base/config.json").read_text()
    told = json.loads(whole)
    for part in (told, told.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
    if make is nested:
        told["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "base/config.json").write_text(json.dumps(told))

    tokens = torch.tensor([[1, 5, 7, 3]])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[table]))
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    with torch.no_grad():
        want = adapted.eval()(tokens).logits.numpy()
    adapted.save_pretrained(tmp_path / "lora")

    def merge(form):
        config = {
            "merge_method": "concat", "models": [{"model": "lora"}], "base_model": "base",
            "out": {"path": form, "format": form},
        }  # fmt: skip
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
        return command.main(["--config", str(tmp_path / "merge.yaml")])

    assert merge("merged") == 2 and not (tmp_path / "merged").exists()
    said = capsys.readouterr().err
    assert "got tie_word_embeddings true" in said, said
    assert merge("peft") == 0
    (tmp_path / "base/config.json").write_text(whole)
    again = type(model).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "peft").eval()
    with torch.no_grad():
        got = again(tokens).logits.numpy()
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()

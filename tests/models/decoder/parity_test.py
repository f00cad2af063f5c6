"""The same weights in transformers (torch): logits of every family agree, and the files go back."""

import dataclasses
import functools
import json
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import decoder

torch = pytest.importorskip("torch", reason="torch is a test-only requirement (Python 3.11)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "llama dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            "max_position_embeddings": 8,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 6}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    ),
    "qwen3": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 6}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 4, "layer_types": MIXED,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 4, "layer_types": MIXED},
    ),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 40, (2, 11)).astype(np.int32)


def torch_model(folder, case):
    """A random model on disk; weights far from the initial ones."""
    kind, fields = CASES[case]
    torch.manual_seed(0)
    base = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = getattr(transformers, kind + "Config")(**(base | fields))
    name = kind.replace("Text", "") + "ForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(decoder.forward, config=config))


def error(folder, model):
    config, params = decoder.load(folder)
    ours = np.asarray(compiled(config)(params, jnp.asarray(IDS)).logits)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS).long()).logits.float().numpy()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_of_every_family_and_files_back_bit_for_bit(tmp_path, case):
    model = torch_model(tmp_path / "theirs", case)
    assert error(tmp_path / "theirs", model) < 1e-4
    config, params = decoder.load(tmp_path / "theirs")
    decoder.save(tmp_path / "ours", config, params, shard=4000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again, back = decoder.load(tmp_path / "ours")
    assert again == config
    chex.assert_trees_all_equal(params, back)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        ids = torch.tensor(IDS).long()
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"kv_heads": 1}, {"rope": decoder.Rope(50.0)}, {"norm_eps": 0.1}, {"window": 3}]
)
def test_the_parity_sees_a_wrong_config(tmp_path, change):
    """Mutations: one field off moves the logits by more than the tolerance, or does not load."""
    model = torch_model(tmp_path, "mistral")
    config, params = decoder.load(tmp_path)
    wrong = dataclasses.replace(config, **change)
    if "kv_heads" in change:
        with pytest.raises(Exception, match="shape"):
            decoder.forward(params, jnp.asarray(IDS), config=wrong)
        return
    ours = np.asarray(decoder.forward(params, jnp.asarray(IDS), config=wrong).logits)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS).long()).logits.numpy()
    assert np.abs(ours - theirs).max() > 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type: got 'mamba'"),
        ({"hidden_act": "relu"}, "activation: got 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scaling: got 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"num_key_value_heads": 3}, "heads: got 4, expected a multiple of 3"),
    ],
)
def test_what_the_decoder_lacks_is_named(tmp_path, change, message):
    torch_model(tmp_path, "llama")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        decoder.load(tmp_path)


def test_old_names_of_the_rotary_fields_are_read(tmp_path):
    torch_model(tmp_path, "llama3")
    now = decoder.config_from_hf(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = dict(raw.pop("rope_parameters"))
    raw |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert decoder.config_from_hf(tmp_path) == now


def test_shards_outside_the_folder_and_missing_tensors_are_refused(tmp_path):
    torch_model(tmp_path / "model", "llama")
    config, params = decoder.load(tmp_path / "model")
    decoder.save(tmp_path / "cut", config, params, shard=4000)
    index = tmp_path / "cut/model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name = next(iter(raw["weight_map"]))
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {name: "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"file name '\.\./x\.safetensors'"):
        decoder.load(tmp_path / "cut")
    cut = {k: v for k, v in params.items() if k != "norm"}
    with pytest.raises(ValueError, match="norm/scale: missing"):
        decoder.save(tmp_path / "none", config, cut)
    with pytest.raises(ValueError, match=r"surplus \['extra'\]"):
        decoder.save(tmp_path / "none", config, {**params, "extra": jnp.ones(3)})

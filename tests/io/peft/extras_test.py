"""`bias="all"` and `modules_to_save`: adapters that bring weights of the base along."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, safetensors_file
from tests.io.shared import error, torch_model, torch_output


def bytes_of(path):
    return (path / "adapter_model.safetensors").read_bytes()


def config(path):
    return json.loads((path / "adapter_config.json").read_text())


def test_biases_and_modules_that_are_saved_with_an_adapter(golden, tmp_path):
    """PEFT's outputs, with the weights that the file brings along; bitwise back."""
    bert, llama = golden["bert"], golden["llama"]
    for model, name in ((bert, "lora_bias_all"), (llama, "lora_saved")):
        path = model.path / name
        with pytest.raises(FormatError, match="replaces weights of the base model"):
            jl.io.load_peft(path, model.names, model.params, layout="in_out")
        adapter = jl.io.load_peft(path, model.names, model.params, extras="leave", layout="in_out")
        extras = jl.io.peft_extras(path)
        params = jax.tree.map(lambda t: t, model.params)
        if name == "lora_saved":
            assert list(extras) == ["lm_head.weight"]
            params["head"]["kernel"] = jnp.asarray(extras["lm_head.weight"].T)
        else:
            assert len(extras) == 1 + 8 * 3  # of every LayerNorm and matrix
            params = encoder_with(params, extras)
        want = safetensors_file.read(path / "expected.safetensors")[0]["expected"]
        assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) > 1e-3
        assert error(jl.lift(model.fn)(params, adapter, *model.args), want) <= 1e-5
        jl.io.save_peft(tmp_path / name, adapter, model.names, extras=extras)
        assert bytes_of(tmp_path / name) == bytes_of(path)
        told = config(tmp_path / name)
        same = ("bias", "modules_to_save")
        assert {k: told[k] for k in same} == {k: config(path)[k] for k in same}


def encoder_with(params, biases):
    """The encoder's parameters with other biases, of torch's names."""
    names = {
        "attention.self.query": ("attention", "query"),
        "attention.self.key": ("attention", "key"),
        "attention.self.value": ("attention", "value"),
        "attention.output.dense": ("attention", "out"),
        "intermediate.dense": ("ffn", "up"),
        "output.dense": ("ffn", "down"),
        "attention.output.LayerNorm": ("attention", "norm"),
        "output.LayerNorm": ("ffn", "norm"),
    }
    for torch_name, (group, name) in names.items():
        keys = [f"encoder.layer.{i}.{torch_name}.bias" for i in range(3)]
        params["layers"][group][name]["bias"] = jnp.asarray(np.stack([biases[k] for k in keys]))
    norm = {"bias": jnp.asarray(biases["embeddings.LayerNorm.bias"])}
    params["embeddings"]["norm"] = {**params["embeddings"]["norm"], **norm}
    return params


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embedding_tables_that_peft_saves_whole(golden, tmp_path, targets):
    """`save_embedding_layers=True`, as of a resized vocabulary: the config does not say so."""
    peft, model = pytest.importorskip("peft"), golden["llama"]
    module = peft.get_peft_model(
        torch_model(model), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    module.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert config(tmp_path / "theirs")["modules_to_save"] is None
    with pytest.raises(FormatError, match=r"replaces weights of the base model.*embed_tokens"):
        jl.io.load_peft(tmp_path / "theirs", model.names, model.params, layout="in_out")
    adapter = jl.io.load_peft(
        tmp_path / "theirs", model.names, model.params, layout="in_out", extras="leave"
    )
    extras = jl.io.peft_extras(tmp_path / "theirs")
    head = {"lm_head.weight"} if len(targets) == 1 else set()  # PEFT's choice
    assert set(extras) == {"model.embed_tokens.weight", *head}
    np.testing.assert_array_equal(
        extras["model.embed_tokens.weight"], model.params["embed_tokens"]["embedding"]
    )
    want = torch_output(module, model)
    assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) <= 1e-5
    if len(targets) == 1:
        jl.io.save_peft(tmp_path / "ours", adapter, model.names, extras=extras)
        assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "theirs")
        again = peft.PeftModel.from_pretrained(torch_model(model), tmp_path / "ours")
        np.testing.assert_array_equal(torch_output(again, model), want)


def test_other_whole_weights_stay_an_error(golden, tmp_path):
    """A matrix that nothing announces, or a table of another number of axes."""
    model = golden["llama"]
    for name, shape in (
        ("model.layers.0.self_attn.k_proj.weight", (8, 16)),
        ("lm_head.weight", (32,)),
        ("lm_head.gain", (32,)),
    ):
        adapter = jl.io.load_peft(model.path / "lora", model.names, model.params, layout="in_out")
        jl.io.save_peft(tmp_path, adapter, model.names)
        tensors, header = safetensors_file.read(tmp_path / "adapter_model.safetensors")
        tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)
        safetensors_file.write(tmp_path / "adapter_model.safetensors", tensors, header)
        with pytest.raises(FormatError, match=f"surplus tensor 'base_model.model.{name}'"):
            jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out", extras="leave")

"""`bias="all"` and `modules_to_save`: adapters that bring weights of the base along."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, safetensors_file
from tests.io.shared import error


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
            jl.io.load_peft(path, model.names, model.params)
        adapter = jl.io.load_peft(path, model.names, model.params, extras="leave")
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

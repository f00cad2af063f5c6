"""The ViT: the same weights in transformers (torch), its PEFT adapters, and errors."""

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.io import presets
from jlora.models import layers, vit

torch = pytest.importorskip("torch", reason="torch is a test-only requirement (Python 3.11)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def _torch_model(folder: Path, **changes):
    """A random model on disk, its every weight far from the initial zeros and ones."""
    torch.manual_seed(0)
    base = {
        "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 20, "image_size": 8, "patch_size": 4, "layer_norm_eps": 1e-3,
    }  # fmt: skip
    model = ViTModel(ViTConfig(**(base | changes), attn_implementation="eager")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def _torch_states(model) -> np.ndarray:
    pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state.numpy()


def _error(folder, model) -> float:
    config, params = vit.load(folder)
    ours = jax.jit(vit.Vit(config).apply)({"params": params}, IMAGES)
    assert ours.shape == (2, 1 + config.patches, config.width)
    return float(np.abs(np.asarray(ours) - _torch_states(model)).max())


@pytest.mark.parametrize("patch", [4, 2])
def test_states_are_those_of_transformers(tmp_path, patch):
    assert _error(tmp_path, _torch_model(tmp_path, patch_size=patch)) < 1e-4


def test_parity_check_sees_a_wrong_part(tmp_path, monkeypatch):
    model = _torch_model(tmp_path)
    good = layers.attention
    with monkeypatch.context() as patch:
        patch.setattr(layers, "attention", lambda q, k, v, b, h: good(q * 1.02, k, v, b, h))
        assert _error(tmp_path, model) > 1e-4
    cut = vit.cut
    monkeypatch.setattr(vit, "cut", lambda x, p: cut(x.transpose(0, 2, 1, 3), p))
    assert _error(tmp_path, model) > 1e-4


def test_cut_by_numpy():
    got = np.asarray(vit.cut(IMAGES, 4))
    for n in range(4):
        top, left = 4 * (n // 2), 4 * (n % 2)
        square = IMAGES[:, top : top + 4, left : left + 4]
        np.testing.assert_array_equal(got[:, n], square.transpose(0, 3, 1, 2).reshape(2, -1))


def test_fresh_parameters_have_the_tree_of_loaded_ones(tmp_path):
    _torch_model(tmp_path)
    config, params = vit.load(tmp_path)
    fresh = jax.eval_shape(vit.Vit(config).init, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)


def test_a_peft_adapter_of_transformers_model_loads(tmp_path):
    model = _torch_model(tmp_path / "base")
    config, params = vit.load(tmp_path / "base")
    before = _torch_states(model)
    chosen = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj", "fc1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name transformers renamed
        tuned = get_peft_model(model, chosen).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    adapter = jl.io.load_peft(tmp_path / "adapter", presets.vit(prefix=""), params, layout="in_out")
    apply = lambda p, x: vit.Vit(config).apply({"params": p}, x)  # noqa: E731
    ours = np.asarray(jax.jit(jl.lift(apply))(params, adapter, IMAGES))
    after = _torch_states(tuned)
    assert float(np.abs(after - before).max()) > 1e-2
    np.testing.assert_allclose(ours, after, atol=1e-4)


def test_errors_name_got_and_expected(tmp_path):
    _torch_model(tmp_path)
    config, params = vit.load(tmp_path)
    with pytest.raises(ValueError, match=r"images: got shape \(2, 8, 4, 3\)"):
        vit.Vit(config).apply({"params": params}, IMAGES[:, :, :4])
    with pytest.raises(ValueError, match="width 12 is not a multiple of heads 5"):
        vit.VitConfig(**{**vars(config), "heads": 5})
    with pytest.raises(ValueError, match="side 8 is not a multiple of patch 3"):
        vit.VitConfig(**{**vars(config), "patch": 3})
    with pytest.raises(ValueError, match=r"missing tensors \[\], surplus tensors \['layernorm"):
        vit.load(_edit(tmp_path, num_hidden_layers=3, model="layernorm.extra"))
    with pytest.raises(ValueError, match=r"missing tensors \['encoder.layer.3"):
        vit.load(_edit(tmp_path, num_hidden_layers=4))
    with pytest.raises(ValueError, match="qkv_bias: got False, expected True"):
        vit.load(_edit(tmp_path, num_hidden_layers=3, qkv_bias=False))


def _edit(folder: Path, model: str = "", **fields) -> Path:
    """The checkpoint with other fields, and one more tensor of that name."""
    from safetensors.numpy import load_file, save_file

    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "extra" not in k}
    more = {model: np.zeros(3, np.float32)} if model else {}
    save_file(tensors | more, folder / "model.safetensors")
    return folder

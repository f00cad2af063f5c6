"""Name maps: both directions, offsets, and that ambiguity is an error."""

import pytest

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
    with pytest.raises(ValueError, match="no regular expression"):
        NameMap({"(": "q"})
    with pytest.raises(ValueError, match="negative"):
        bert(layer_offset=-1)
    with pytest.raises(ValueError, match="stack axes and a group"):
        llama().module("layers_7/self_attn/q_proj/kernel", (1,))

"""Layer replication: PEFT's golden adapter of layers 0, 1, 1, 2, and what is refused."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, replicate_layers, safetensors_file
from jlora.io.peft.replication import order_of
from tests.io.shared import error

PAIRS = [[0, 2], [1, 3]]
PATH = "layers/attention/query/kernel"


@pytest.fixture(scope="module")
def case(golden):
    """(model, folder of the adapter, its expanded parameters)."""
    model = golden["llama"]
    return model, model.path / "lora_replicated", replicate_layers(model.params, PAIRS)


def load(case, pairs=PAIRS, params=None):
    model, path, expanded = case
    params = expanded if params is None else params
    return jl.io.load_peft(path, model.names, params, layer_replication=pairs, layout="in_out")


def check_value(case):
    model, path, expanded = case
    want = safetensors_file.read(path / "expected.safetensors")[0]["expected"]
    assert error(model.expected, want) > 1e-3
    assert error(jl.lift(model.fn)(expanded, load(case), *model.args), want) <= 1e-5


def test_it_computes_what_peft_computes(case):
    check_value(case)


def test_it_goes_back_bitwise(case, tmp_path):
    model, path, _ = case
    adapter = load(case)
    assert adapter.trainable[PATH]["a"].shape[0] == 4
    jl.io.save_peft(tmp_path, adapter, model.names, layer_replication=PAIRS)
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_replication"] == PAIRS
    back = jl.io.load_peft(tmp_path, model.names, case[2], layer_replication=PAIRS, layout="in_out")
    chex.assert_trees_all_equal(adapter, back)


def test_layers_by_numpy_others_untouched():
    params = {"layers": {"w": jnp.arange(6.0).reshape(3, 2)}, "head": jnp.ones(3)}
    out = replicate_layers(params, PAIRS)
    np.testing.assert_array_equal(out["layers"]["w"], np.arange(6.0).reshape(3, 2)[[0, 1, 1, 2]])
    assert out["head"] is params["head"] and params["layers"]["w"].shape == (3, 2)
    assert order_of([(2, 4), (0, 1)]) == [2, 3, 0]


def test_refusals(case, tmp_path):
    model, _, expanded = case
    with pytest.raises(FormatError, match=r"expected None; expand the parameters"):
        load(case, None)
    with pytest.raises(FormatError, match=r"layer_replication is \[\[0, 2\], \[1, 3\]\], expected"):
        load(case, [[0, 4]])
    with pytest.raises(FormatError, match=r"layers\.3\..* is not a site"):
        load(case, params=model.params)
    other = model.path / "lora"
    with pytest.raises(FormatError, match="layer_replication is None, expected"):
        jl.io.load_peft(other, model.names, expanded, layer_replication=PAIRS, layout="in_out")
    adapter = load(case)
    with pytest.raises(FormatError, match="expected 3 replicated layers first"):
        jl.io.save_peft(tmp_path / "x", adapter, model.names, layer_replication=[[0, 3]])
    with pytest.raises(FormatError, match=r"got \[2, 1\], expected \[start, stop\]"):
        jl.io.save_peft(tmp_path / "x", adapter, model.names, layer_replication=[[2, 1]])
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"has 3 layers, layer_replication asks for 4"):
        replicate_layers(model.params, [[0, 5]])
    with pytest.raises(ValueError, match="no leaf lies below 'blocks'"):
        replicate_layers(model.params, PAIRS, "blocks")


def test_mutation_layers_in_another_order_are_seen(case):
    model, path, _ = case
    wrong = replicate_layers(model.params, [[0, 2], [0, 2]])
    with pytest.raises(AssertionError):
        check_value((model, path, wrong))

"""Experts that are bare parameters: PEFT's `target_parameters`, golden adapters, refusals."""

import functools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.peft import parameters as peft_parameters
from tests.io.shared import error

GOLDEN = Path(__file__).parents[3] / "third_party" / "peft" / "experts"
STATE, _ = safetensors_file.read(GOLDEN / "base.safetensors")
X = jnp.asarray(STATE["x"])
WEIGHTS = "adapter_model.safetensors"
ADAPTERS = ("lora", "lora_layouts", "lora_more")
NAMES = NameMap(
    {
        r"layers/gate/kernel": "layers.{i}.gate",
        r"layers/(experts|turned)/up": r"layers.{i}.\1[up]",
        r"layers/(experts|turned)/down": r"layers.{i}.\1[down]",
        r"layers/flat/up": "layers.{i}.flat[up.T]",
        r"layers/flat/down": "layers.{i}.flat[down.T]",
    }
)


def stacked(name, turn):
    both = np.stack([STATE[f"layers.{i}.{name}"] for i in range(2)])
    return jnp.asarray(both.swapaxes(-1, -2) if turn else both)


PARAMS = {
    "layers": {
        "gate": {"kernel": stacked("gate.weight", True)},
        **{
            group: {name: stacked(f"{group}.{name}", group == "experts") for name in ("up", "down")}
            for group in ("experts", "turned", "flat")
        },
    }
}


def model(params, x, spec="ebi,eio->ebo"):
    """x [b, 5] through layers of dense mixtures of three experts of three kinds.

    With `spec` "bi,eio->ebo" the first matmul of each has x as it is, without an axis of experts.
    """

    def layer(x, p):
        def mixture(w):
            h = jnp.tanh(jnp.einsum(spec, every, w["up"]))
            return jnp.einsum("ebi,eio->ebo", h, w["down"])

        every = jnp.broadcast_to(x, (3, *x.shape)) if spec.startswith("e") else x
        share = jax.nn.softmax(x @ p["gate"]["kernel"])
        y = sum(mixture(p[group]) for group in ("experts", "turned", "flat"))
        return x + jnp.einsum("be,ebo->bo", share, y), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def load(path, names=NAMES):
    return jl.io.load_peft(path, names, PARAMS, layout="in_out")


def check_value(name, names=NAMES):
    want = safetensors_file.read(GOLDEN / name / "expected.safetensors")[0]["expected"]
    assert error(model(PARAMS, X), STATE["expected"]) <= 1e-5 < 1e-3 < error(model(PARAMS, X), want)
    adapter = load(GOLDEN / name, names)
    assert error(model(jl.merge(PARAMS, adapter), X), want) <= 1e-5
    assert error(jl.lift(model)(PARAMS, adapter, X), want) <= 1e-5


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_computes_what_peft_computes(name):
    check_value(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_goes_back_bitwise(name, tmp_path):
    adapter = load(GOLDEN / name)
    jl.io.save_peft(tmp_path, adapter, NAMES)
    assert (tmp_path / WEIGHTS).read_bytes() == (GOLDEN / name / WEIGHTS).read_bytes()
    back = load(tmp_path)
    assert back.sites == adapter.sites
    chex.assert_trees_all_equal(adapter, back)


def test_experts_that_no_input_has_an_axis_of():
    """One input for all experts, "bi,eio->ebo": nothing is merged, forward or backward."""
    want = safetensors_file.read(GOLDEN / "lora" / "expected.safetensors")[0]["expected"]
    adapter = load(GOLDEN / "lora")
    shared = functools.partial(model, spec="bi,eio->ebo")
    assert error(shared(jl.merge(PARAMS, adapter), X), want) <= 1e-5
    assert error(jl.lift(shared)(PARAMS, adapter, X), want) <= 1e-5
    assert error(jl.lift(model)(PARAMS, adapter, X), want) <= 1e-5  # its input repeated


def test_layers_and_experts_by_numpy():
    tensors, _ = safetensors_file.read(GOLDEN / "lora_more" / WEIGHTS)
    adapter = load(GOLDEN / "lora_more")
    assert {s.path: s.stack for s, _ in adapter.sites} == {
        "layers/experts/down": (2, 3),
        "layers/gate/kernel": (2,),
        "layers/turned/up": (2, 3),
    }
    first = tensors["base_model.model.layers.1.turned.lora_A.weight"]  # [3 experts * 2, 5]
    second = tensors["base_model.model.layers.1.turned.lora_B.weight"]  # [6, 2 * 3 experts]
    got = jl.delta(PARAMS, adapter)["layers/turned/up"]
    for e in range(3):
        want = 5 / np.sqrt(2) * (second[:, e::3] @ first[2 * e : 2 * e + 2]).T
        np.testing.assert_allclose(got[1, e], want, rtol=1e-4, atol=1e-6)
    assert not np.any(got[0])


def edited(folder, change=lambda t: None, name="lora", **fields):
    path = shutil.copytree(GOLDEN / name, folder / "edited")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    tensors, meta = safetensors_file.read(path / WEIGHTS)
    change(tensors)
    safetensors_file.write(path / WEIGHTS, tensors, meta)
    return path


KEY = "base_model.model.layers.0.experts.base_layer.lora_A.weight"


@pytest.mark.parametrize(
    ("fields", "change", "why"),
    [
        ({"target_parameters": "experts.up"}, None, "expected a list of names"),
        ({"target_parameters": [7]}, None, "expected a list of names"),
        ({"target_parameters": ["experts.side"]}, None, r"is called \['experts.side'\]"),
        ({"target_parameters": ["experts.up"]}, None, r"shape|no site"),
        ({"target_parameters": None}, None, "not a site"),
        ({"target_parameters": ["experts.up", "experts.down", "flat.up"]}, None, "lacks"),
        ({"r": 3}, None, r"has shape \[6, 7\], expected \[9, 7\]"),
        ({"lora_dropout": 0.5}, None, "PEFT has none of parameters"),
        ({"use_dora": True}, None, "target_parameters"),
        ({"target_modules": ["gate"]}, None, "lacks tensors of the targets"),
        ({}, lambda t: t.pop(KEY), "lacks"),
        ({}, lambda t: t.update({"base_model.model.layers.0.x": t[KEY]}), "surplus"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, fields, change, why):
    with pytest.raises(FormatError, match=why):
        load(edited(tmp_path, change or (lambda t: None), **fields))


def test_what_peft_cannot_say_is_not_written(tmp_path):
    def made(method):
        methods = {"experts/up": method}
        return jl.init(jax.random.key(0), model, PARAMS, X, methods=methods)

    uneven = made(jl.LoRA(2))
    scale = uneven.frozen["layers/experts/up"]["scale"].at[1, 2].set(9.0)
    uneven = uneven.replace(
        frozen={"layers/experts/up": {"scale": scale}},
        trainable=jax.tree.map(lambda t: t + 1, uneven.trainable),
    )
    for adapter, why in (
        (made(jl.DoRA(2)), "by LoRA without dropout"),
        (made(jl.LoRA(2, dropout=0.1)), "by LoRA without dropout"),
        (uneven, "one scale for all experts"),
    ):
        with pytest.raises(FormatError, match=why):
            jl.io.save_peft(tmp_path / "x", adapter, NAMES)
    assert not (tmp_path / "x").exists()


def test_real_peft_reads_what_we_write(tmp_path, monkeypatch):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "golden")
    import make_peft

    base = make_peft.Mixture()
    state = {k: torch.from_numpy(v) for k, v in STATE.items() if k.startswith("layers")}
    base.load_state_dict(state)
    adapter = jl.init(
        jax.random.key(0), model, PARAMS, X, methods={"experts|turned|gate": jl.LoRA(2, 3.0)}
    )
    rng = np.random.default_rng(0)
    adapter = adapter.replace(
        trainable=jax.tree.map(
            lambda t: jnp.asarray(rng.normal(size=t.shape) / 3, t.dtype), adapter.trainable
        )
    )
    jl.io.save_peft(tmp_path, adapter, NAMES)
    module = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        theirs = module(torch.from_numpy(STATE["x"])).numpy()
    ours = jl.lift(model)(PARAMS, adapter, X)
    assert error(ours, STATE["expected"]) > 1e-2 and error(ours, theirs) <= 1e-5


def test_mutation_experts_dealt_the_other_way_are_seen(monkeypatch):
    good = peft_parameters._read

    def mixed(one, first, second, fields):
        d, size = second.shape
        n = len(one.experts)
        second = second.reshape(d, n, size // n).swapaxes(1, 2).reshape(d, size)
        return good(one, first, second, fields)

    monkeypatch.setattr(peft_parameters, "_read", mixed)
    with pytest.raises(AssertionError):
        check_value("lora")


def test_a_map_with_two_unnamed_axes_is_an_error():
    names = NameMap({r"w": "experts[w]"})
    with pytest.raises(ValueError, match="'w' has stack"):
        names.parameters([jl.Site("w", (2, 3, 4, 5), "ssio", jnp.dtype("float32"))])

"""Leaves that are several torch modules: named slices, with and without layers, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import NameMap, safetensors_file, sliced
from jlora.methods.selective.bitfit import BitFit

L, D, K, H, N, F = 2, 6, 2, 3, 4, 5
ONE = {r"layer_(?P<i>\d+)/kv": ("model.layers.{i}.attn.{k_proj|v_proj}", "soio")}
SCANNED = {"layers/kv": ("model.layers.{i}.attn.{k_proj|v_proj}", "ssoio")}
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def double(x):
    return np.asarray(x, np.float64)


def attention(kv, gate, x):
    k, v = jnp.einsum("td,ckdh->ctkh", x, kv)
    return jnp.einsum("td,cfd->ctf", x, gate).sum() + (jnp.tanh(k) * v).sum()


LISTED = {f"layer_{n}": {"kv": draw(2, K, D, H), "gate": draw(2, F, D)} for n in range(L)}
STACKED = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *LISTED.values())}
X = draw(4, D)


def listed(params, x):
    return sum(attention(**p, x=x) for p in params.values())


def scanned(params, x):
    return jax.lax.scan(lambda c, p: (c + attention(**p, x=x), None), 0.0, params["layers"])[0]


MODELS = {"listed": (listed, LISTED, NameMap(ONE)), "scanned": (scanned, STACKED, NameMap(SCANNED))}


def trained(fn, params, methods):
    fresh = jl.init(jax.random.key(0), fn, params, X, methods=methods)
    noise = jax.tree.map(lambda t: t + draw(*t.shape), fresh.trainable)
    return fresh.replace(trainable=noise)


def tensors_of(folder):
    return safetensors_file.read(folder / "adapter_model.safetensors")[0]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [jl.LoRA(2, 3.0), jl.DoRA(2, 3.0)], ids=["lora", "dora"])
def test_an_adapter_of_all_slices_is_written_as_modules(kind, method, tmp_path):
    fn, params, names = MODELS[kind]
    adapter = trained(fn, params, {"kv": method})
    assert all("ooio" in site.kinds for site, _ in adapter.sites)
    jl.io.save_peft(tmp_path, adapter, names)
    found, merged = tensors_of(tmp_path), jl.merge(params, adapter)
    for layer in range(L):
        path = "layers" if kind == "scanned" else f"layer_{layer}"
        at = (layer,) if kind == "scanned" else ()
        for c, name in enumerate(("k_proj", "v_proj")):
            key = f"base_model.model.model.layers.{layer}.attn.{name}"
            a, b = (double(found[f"{key}.lora_{x}.weight"]) for x in "AB")
            w = double(params[path]["kv"][(*at, c)]).transpose(0, 2, 1).reshape(K * H, D)
            want = w + 1.5 * b @ a
            if isinstance(method, jl.DoRA):
                m = double(found[f"{key}.lora_magnitude_vector"])
                want *= m[:, None] / np.linalg.norm(want, axis=1, keepdims=True)
            got = np.asarray(merged[path]["kv"][(*at, c)]).transpose(0, 2, 1).reshape(K * H, D)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_read_is_written_bitwise_and_lifts(kind, tmp_path):
    """Of factors that the slices do not share, by the sites and by the parameters alone."""
    fn, params, names = MODELS[kind]
    tensors = {}
    for layer in range(L):
        for name in ("k_proj", "v_proj"):
            key = f"base_model.model.model.layers.{layer}.attn.{name}"
            tensors |= {f"{key}.lora_A.weight": np.asarray(draw(2, D)),
                        f"{key}.lora_B.weight": np.asarray(draw(K * H, 2))}  # fmt: skip
    safetensors_file.write(tmp_path / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for where in (jl.sites(fn, params, X), params):
        adapter = jl.io.load_peft(tmp_path, names, where)
        assert all("soio" in site.kinds for site, _ in adapter.sites)
        jl.io.save_peft(tmp_path / "again", adapter, names)
        again = tensors_of(tmp_path / "again")
        assert again.keys() == tensors.keys()
        assert all(np.array_equal(again[k], t) for k, t in tensors.items())
    want = fn(jl.merge(params, adapter), X)
    np.testing.assert_allclose(jl.lift(fn)(params, adapter, X), want, rtol=2e-5)
    delta = jl.merge(params, adapter)
    path, at = ("layers", (1, 1)) if kind == "scanned" else ("layer_1", (1,))
    key = "base_model.model.model.layers.1.attn.v_proj"
    got = np.asarray(delta[path]["kv"][at] - params[path]["kv"][at]).transpose(0, 2, 1)
    want = 1.5 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(got.reshape(K * H, D), want, rtol=1e-4, atol=1e-5)


def test_slices_become_adapters_of_their_own_and_stay_the_function():
    fn, params, names = MODELS["scanned"]
    rules = {**names.rules, "layers/gate": ("l.{i}.{gate_proj|up_proj}", "ssoi")}
    adapter = trained(fn, params, {"all-linear": jl.LoRA(2)})
    parts = sliced(adapter, NameMap(rules))
    assert {s.path: s.kinds for s, _ in parts.sites} == {
        "layers/kv": "ssoio",
        "layers/gate": "ssoi",
    }
    a, b = (jl.merge(params, x)["layers"] for x in (adapter, parts))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert parts.trainable["layers/kv"]["b"].shape == (L, 2, 2, K * H)
    np.testing.assert_allclose(jl.lift(fn)(params, parts, X), fn(b and {"layers": b}, X), rtol=2e-5)
    assert sliced(parts, NameMap(rules)) is parts


@pytest.mark.parametrize("save", ["kohya", "diffusers"])
def test_other_formats_have_the_same_names(save, tmp_path):
    fn, params, names = MODELS["listed"]
    adapter = trained(fn, params, {"kv": jl.LoRA(2, 3.0)})
    path = tmp_path / "x.safetensors"
    getattr(jl.io, f"save_{save}")(path, adapter, names)
    back = getattr(jl.io, f"load_{save}")(path, names, params)
    for a, b in zip(*(jax.tree.leaves(jl.merge(params, x)) for x in (adapter, back)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_vectors_have_slices_too(tmp_path):
    rules = {"kv": ("attn.{k_proj|v_proj}", "soi"), "bias": ("attn.{k_proj|v_proj}[bias]", "so")}
    names, params = NameMap(rules), {"kv": draw(2, 3, D), "bias": draw(2, 3)}
    fn = lambda p, x: jnp.einsum("td,cod->tco", x, p["kv"]) + p["bias"][None]  # noqa: E731
    adapter = trained(fn, params, {"kv": jl.LoRA(2), "bias": BitFit()})
    jl.io.save_peft(tmp_path, adapter, names)
    found, v = tensors_of(tmp_path), adapter.trainable["bias"]["v"]
    key = "base_model.model.attn.v_proj.base_layer.bias"
    np.testing.assert_array_equal(found[key], np.asarray(v).reshape(2, 3)[1])


def test_what_does_not_fit_is_refused(tmp_path):
    fn, params, names = MODELS["listed"]
    sites = jl.sites(fn, params, X)
    with pytest.raises(ValueError, match=r"has 2 slices, the rule names \['q', 'k', 'v'\]"):
        NameMap({"layer_./kv": ("{q|k|v}", "soio")}).site(sites["layer_0/kv"])
    with pytest.raises(ValueError, match="has axes 'siio' by its rule, 'ooio' by its use"):
        NameMap({"layer_./kv": ("{k|v}", "siio")}).site(sites["layer_0/kv"])
    jl.io.save_peft(tmp_path, trained(fn, params, {"kv": jl.LoRA(2)}), names)
    with pytest.raises(ValueError, match=r"got shape .*expected axes 'soi' by the name map"):
        jl.io.load_peft(tmp_path, NameMap({"layer_./kv": ("{k|v}", "soi")}), params)
    mixed = trained(fn, params, {"kv": jl.LoKr(2)})
    with pytest.raises(ValueError, match="got LoKr of all outputs"):
        jl.io.save_peft(tmp_path / "x", mixed, names)
    assert not (tmp_path / "x").exists()


def test_mutation_turned_names_are_seen(tmp_path):
    fn, params, names = MODELS["listed"]
    adapter = trained(fn, params, {"kv": jl.LoRA(2)})
    jl.io.save_peft(tmp_path, adapter, names)
    turned = {k: (t.replace("k_proj|v_proj", "v_proj|k_proj"), s) for k, (t, s) in ONE.items()}
    back = jl.io.load_peft(tmp_path, NameMap(turned), params)
    got, want = (jl.merge(params, x)["layer_0"]["kv"] for x in (back, adapter))
    np.testing.assert_allclose(got[::-1] - params["layer_0"]["kv"][::-1],
                               want - params["layer_0"]["kv"], atol=1e-5)  # fmt: skip
    assert not np.allclose(got, want, atol=1e-2)

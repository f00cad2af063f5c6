"""Convolutions in files of the real LyCORIS: its deltas, its outputs, the same bits back."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.site import unfold
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.kohya import layout as lycoris_layout
from jlora.io.kohya import modules as kohya_modules
from jlora.methods.decomposed import decomposed
from tests.io.shared import conv, error, kernels

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "third_party" / "lycoris" / "conv"
STATE, _ = safetensors_file.read(GOLDEN / "base.safetensors")
MODULES = ("two", "point", "grouped", "one", "three", "head")
NAMES = NameMap({rf"({'|'.join(MODULES)})/kernel": r"\1"})
X = jnp.asarray(STATE["x"])
METHODS = {"lora": jl.LoRA, "dora": jl.DoRA, "lora_core": jl.LoCon} | {
    name: jl.LoHa if name.startswith("loha") else jl.LoKr
    for name in (
        *("loha", "loha_core", "lokr", "lokr_core"),
        *("lokr_core_both", "lokr_unbalanced", "lokr_whole"),
    )
}
BY_INPUT = ("dora_in", "doha_in", "dokr_in")
METHODS |= dict.fromkeys(("dora_core", "doha_core", "dokr", "dokr_core", *BY_INPUT), jl.Decomposed)
LIFTED = ("doha_core", "dokr", "dora_in", "lora_core", "loha_core", "lokr_core", "lokr_whole")


def flax_model(p, x, flax=True):
    h = jnp.tanh(conv(p["two"], x, flax, window_strides=(1, 2), padding=((1, 1), (0, 0))))
    options = {"rhs_dilation": (2, 1), "feature_group_count": 2}
    h = jnp.tanh(conv(p["grouped"], jnp.tanh(conv(p["point"], h, flax)), flax, **options))
    h = jnp.tanh(conv(p["one"], h.reshape(2, 8, -1), flax))
    h = jnp.tanh(conv(p["three"], h.reshape(2, 8, 3, 2, 2), flax))
    return h.mean((2, 3, 4)) @ p["head"]["kernel"] + p["head"]["bias"][None]


def torch_like(p, x):
    return flax_model(p, x, flax=False)


FORMS = {
    fn: (kernels(STATE, MODULES, fn is flax_model), jax.jit(fn)) for fn in (flax_model, torch_like)
}
SITES = {fn: jl.sites(fn, p, X) for fn, (p, _) in FORMS.items()}


def load(path, fn):
    return jl.io.load_kohya(path, NAMES, SITES[fn], "lycoris")


def check_value(name, fn):
    told, _ = safetensors_file.read(GOLDEN / f"{name}.expected.safetensors")
    want = told.pop("expected")
    p, run = FORMS[fn]
    assert error(run(p, X), STATE["expected"]) <= 1e-5 < 1e-3 < error(run(p, X), want)
    adapter = load(GOLDEN / f"{name}.safetensors", fn)
    kinds = {site.path: type(method) for site, method in adapter.sites}
    plain = {"lora_core": jl.LoRA, "dora_core": jl.DoRA}.get(name, METHODS[name])
    ones = ("head/kernel", "point/kernel")  # windows of one place
    assert kinds == {path: plain if path in ones else METHODS[name] for path in kinds}
    assert error(run(jl.merge(p, adapter), X), want) <= 1e-5
    if METHODS[name] in (jl.DoRA, jl.Decomposed):  # depends on the weight
        return adapter
    made = jl.delta(p, adapter)
    assert set(told) == {f"delta.{module}" for module in MODULES}
    for site, _ in adapter.sites:
        got = np.asarray(unfold(made[site.path], site.kinds, site.shape))
        flax = fn is flax_model or site.path == "head/kernel"
        got = np.moveaxis(got, (-1, -2), (0, 1)) if flax else got
        assert error(got, told[f"delta.{site.path.partition('/')[0]}"]) <= 1e-5
    return adapter


@pytest.mark.parametrize("name", METHODS)
def test_it_computes_what_lycoris_computes_and_goes_back_bitwise(name, tmp_path):
    theirs, _ = safetensors_file.read(GOLDEN / f"{name}.safetensors")
    for fn in FORMS:
        adapter = check_value(name, fn)
        jl.io.save_kohya(tmp_path / "x.safetensors", adapter, NAMES, "lycoris")
        ours, _ = safetensors_file.read(tmp_path / "x.safetensors")
        assert ours.keys() == theirs.keys()
        for key, want in theirs.items():
            assert ours[key].dtype == want.dtype and ours[key].shape == want.shape
            assert ours[key].tobytes() == want.tobytes(), key


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_it_is_the_same(name):
    want = safetensors_file.read(GOLDEN / f"{name}.expected.safetensors")[0]["expected"]
    adapter = load(GOLDEN / f"{name}.safetensors", flax_model)
    assert error(jax.jit(jl.lift(flax_model))(FORMS[flax_model][0], adapter, X), want) <= 1e-5


@pytest.mark.parametrize("name", ["lora_core", "doha_core", "lokr_core_both", "lokr_whole"])
def test_half_files_go_back_bitwise(name, tmp_path):
    """LyCORIS casts every tensor, alpha too."""
    tensors, _ = safetensors_file.read(GOLDEN / f"{name}.safetensors")
    half = {key: array.astype(np.float16) for key, array in tensors.items()}
    safetensors_file.write(tmp_path / "x.safetensors", half, {})
    adapter = load(tmp_path / "x.safetensors", flax_model)
    jl.io.save_kohya(tmp_path / "y.safetensors", adapter, NAMES, "lycoris")
    again, _ = safetensors_file.read(tmp_path / "y.safetensors")
    assert again.keys() == half.keys()
    for key, want in half.items():
        assert again[key].dtype == want.dtype and again[key].tobytes() == want.tobytes(), key


@pytest.mark.parametrize(
    "name",
    [
        *("lora_core", "loha_core", "lokr_core", "lokr_unbalanced", "lokr_whole"),
        *("dora_core", "doha_core", "dokr", "dokr_core", *BY_INPUT),
    ],
)
def test_real_lycoris_computes_what_we_write(name, tmp_path, monkeypatch):
    torch, lycoris = pytest.importorskip("torch"), pytest.importorskip("lycoris")
    script = ROOT / "tests" / "golden" / "make_lycoris.py"
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("make_lycoris", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    base = make.Wide()
    base.load_state_dict({k: torch.from_numpy(STATE[k]) for k in base.state_dict()})
    adapter = load(GOLDEN / f"{name}.safetensors", flax_model)
    adapter = adapter.replace(trainable=jax.tree.map(lambda t: 1.1 * t, adapter.trainable))
    path = tmp_path / "x.safetensors"
    jl.io.save_kohya(path, adapter, NAMES, "lycoris")
    options = {"linear_dim": 2, "linear_alpha": 3.0, **make.WIDE[name]}
    network = lycoris.create_lycoris(base, 1.0, **options)
    network.apply_to()
    network.load_weights(str(path))
    with torch.no_grad():
        theirs = base(torch.from_numpy(STATE["x"])).numpy()
    p, run = FORMS[flax_model]
    assert error(run(jl.merge(p, adapter), X), theirs) <= 1e-5


@pytest.mark.parametrize(
    ("name", "key", "change", "why"),
    [
        ("lokr_core", "two.lokr_t2", lambda t: t[:, :1], r"lokr_t2 has shape"),
        ("lokr_core", "two.lokr_t2", lambda t: t[..., :1], r"lokr_t2 has shape"),
        ("lokr_core", "two.lokr_w2_a", lambda t: t[:, 1:], "which make"),
        ("lokr_core", "two.lokr_w2_b", lambda t: t[:, 1:], "lokr_w2_b has shape"),
        ("lokr_core", "two.lokr_w1", lambda t: t[0], r"expected \[out, in"),
        ("lokr", "two.lokr_w2_b", lambda t: t[:, 1:], "expected a multiple of 6"),
        ("lokr", "two.lokr_w2_b", lambda t: t[:1], "expected one rank"),
        ("lokr", "two.lokr_w2_b", lambda t: t[0], "expected a matrix"),
        ("lokr_whole", "one.lokr_w2", lambda t: t[..., :1], r"expected \[out, in"),
        ("lokr_whole", "three.lokr_w2", lambda t: t[:1], "which make"),
        ("loha_core", "one.hada_t2", lambda t: t[:1], "hada_t2 has shape"),
        ("loha_core", "one.hada_t1", lambda t: None, "no LoRA, LoCon, DoRA, LoHa or LoKr"),
        ("lora_core", "two.lora_mid.weight", lambda t: t[:, :1], r"lora_mid.weight has shape"),
        ("lora_core", "two.lora_down.weight", lambda t: t[:, 1:], r"lora_down.weight has shape"),
        ("lora_core", "two.lora_up.weight", lambda t: t[1:], r"lora_up.weight has shape"),
        ("lora_core", "head.lora_up.weight", lambda t: t[None], r"has shape"),
        ("dora", "three.dora_scale", lambda t: t[:, 0], "dora_scale has shape"),
        ("doha_core", "three.dora_scale", lambda t: t[:, 0], "dora_scale has shape"),
        ("dokr", "head.dora_scale", lambda t: t.T, r"expected \[10, 1\] or \[1, 18\]"),
        ("dora_in", "two.dora_scale", lambda t: t[0], "dora_scale has shape"),
        ("dokr", "head.lokr_w1", lambda t: None, "no LoRA, LoCon, DoRA, LoHa or LoKr"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, key, change, why):
    tensors, _ = safetensors_file.read(GOLDEN / f"{name}.safetensors")
    changed = change(tensors.pop(f"lycoris_{key}"))
    if changed is not None:
        tensors[f"lycoris_{key}"] = np.ascontiguousarray(changed)
    safetensors_file.write(tmp_path / "x.safetensors", tensors, {})
    for fn in FORMS:
        with pytest.raises(FormatError, match=why):
            load(tmp_path / "x.safetensors", fn)


def test_mutation_a_core_with_its_ranks_swapped_is_seen(monkeypatch):
    good = lycoris_layout.core
    for module in (lycoris_layout, kohya_modules):
        monkeypatch.setattr(module, "core", lambda t, n: good(t, n).swapaxes(2, 3))
    for name in ("lora_core", "loha_core", "lokr_core"):
        with pytest.raises(AssertionError):
            check_value(name, flax_model)


def test_mutation_a_channel_taken_for_a_place_of_the_window_is_seen(monkeypatch):
    good = decomposed._places
    monkeypatch.setattr(decomposed, "_places", lambda shape, rows: good(shape[::-1], rows))
    for fn in FORMS:
        with pytest.raises((AssertionError, TypeError, ValueError)):
            check_value("dora_in", fn)


def test_a_core_for_a_matrix_is_refused(tmp_path):
    tensors, _ = safetensors_file.read(GOLDEN / "lora_core.safetensors")
    tensors["lycoris_head.lora_mid.weight"] = np.eye(2, dtype=np.float32)
    safetensors_file.write(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(FormatError, match=r"lora_mid.weight for a matrix"):
        load(tmp_path / "x.safetensors", flax_model)

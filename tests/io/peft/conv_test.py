"""Convolutions in PEFT's and kohya's files: golden adapters of PEFT, and layouts by numpy."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file, torch_layout
from jlora.methods.decomposed.dora import DoRA
from jlora.methods.low_rank.loha import LoHa
from tests.io.shared import error

GOLDEN = Path(__file__).parents[3] / "third_party" / "peft" / "conv"
KINDS = {"lora": jl.LoRA, "dora": DoRA, "loha": LoHa}
STATE, _ = safetensors_file.read(GOLDEN / "base.safetensors")
NAMES = NameMap({r"(one|two|three)/kernel": r"\1"})
X = jnp.asarray(STATE["x"])


def params(flax=True):
    """Kernels as Flax has them, [*window, in, out], or as torch, [out, in, *window]."""

    def kernel(t):
        return np.moveaxis(t, (0, 1), (-1, -2)) if flax else t

    return {
        name: {
            "kernel": jnp.asarray(kernel(STATE[f"{name}.weight"])),
            "bias": jnp.asarray(STATE[f"{name}.bias"]),
        }
        for name in ("two", "one", "three")
    }


def conv(p, x, flax, **options):
    n = x.ndim - 2
    window = "".join("DHW"[3 - n :])
    spec = ("NC" + window, (window + "IO") if flax else ("OI" + window), "NC" + window)
    options = {"window_strides": (1,) * n, "padding": ((0, 0),) * n, **options}
    y = lax.conv_general_dilated(x, p["kernel"], dimension_numbers=spec, **options)
    return y + p["bias"].reshape(1, -1, *(1,) * n)


def model(flax=True):
    def fn(p, x):
        h = jnp.tanh(conv(p["two"], x, flax, window_strides=(1, 2), padding=((1, 1), (0, 0))))
        h = jnp.tanh(conv(p["one"], h.reshape(2, 4, -1), flax))
        return conv(p["three"], h.reshape(2, 2, 3, 2, 13), flax).mean((2, 3, 4))

    return fn


def sites(flax=True):
    return jl.sites(model(flax), params(flax), X)


@pytest.mark.parametrize("flax", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_peft_files_compute_what_peft_computes_and_go_back_bitwise(tmp_path, name, flax):
    want = safetensors_file.read(GOLDEN / name / "expected.safetensors")[0]["expected"]
    fn, p = model(flax), params(flax)
    assert error(fn(p, X), STATE["expected"]) <= 1e-5 < 1e-3 < error(fn(p, X), want)
    adapter = jl.io.load_peft(GOLDEN / name, NAMES, sites(flax))
    assert {type(m) for _, m in adapter.sites} == {KINDS[name]}
    assert error(fn(jl.merge(p, adapter), X), want) <= 1e-5
    if flax:
        assert error(jl.lift(fn)(p, adapter, X), want) <= 1e-5
    jl.io.save_peft(tmp_path, adapter, NAMES)
    files = [
        (folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path, GOLDEN / name)
    ]
    assert files[0] == files[1]
    told = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, GOLDEN / name)]
    assert all(told[0][k] == told[1][k] for k in ("r", "peft_type"))


@pytest.mark.parametrize("name", ["lora", "loha"])
def test_kohya_files_have_the_same_factors(tmp_path, name):
    adapter = jl.io.load_peft(GOLDEN / name, NAMES, sites())
    jl.io.save_kohya(tmp_path / "x.safetensors", adapter, NAMES)
    ours, _ = safetensors_file.read(tmp_path / "x.safetensors")
    theirs, _ = safetensors_file.read(GOLDEN / name / "adapter_model.safetensors")
    swap = {"lora_A": "lora_down", "lora_B": "lora_up"}
    for key, t in theirs.items():
        flat = key.removeprefix("base_model.model.")
        for a, b in swap.items():
            flat = flat.replace(a, b)
        np.testing.assert_array_equal(ours[f"lora_unet_{flat}"], t)
    back = jl.io.load_kohya(tmp_path / "x.safetensors", NAMES, sites())
    chex.assert_trees_all_equal(adapter, back)


def test_diffusers_files_round_trip(tmp_path):
    adapter = jl.io.load_peft(GOLDEN / "lora", NAMES, sites())
    jl.io.save_diffusers(tmp_path / "x.safetensors", adapter, NAMES)
    back = jl.io.load_diffusers(tmp_path / "x.safetensors", NAMES, sites())
    chex.assert_trees_all_equal(adapter, back)


def test_the_two_factors_of_torch_make_the_kernels_delta():
    """sum_r second[o, r] first[r, c, h, w], whichever layout the kernel has."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2 * 3 * 4, 2)), rng.normal(size=(2, 5))
    for shape, kinds, order in (((2, 3, 4, 5), "iiio", (3, 2, 0, 1)), ((5, 4, 2, 3), "oiii", None)):
        site = jl.Site("w", shape, kinds, jnp.dtype("float32"), ("conv",))
        first, second = torch_layout.first(site, a), torch_layout.second(site, b)
        assert first.shape == (2, 4, 2, 3) and second.shape == (5, 2, 1, 1)
        delta = (a @ b).reshape(2, 3, 4, 5) if order else (a @ b).T.reshape(shape)
        want = delta.transpose(order) if order else delta
        np.testing.assert_allclose(np.einsum("or,rchw->ochw", second[..., 0, 0], first), want)
        np.testing.assert_array_equal(torch_layout.of_first(site, first), a)
        np.testing.assert_array_equal(torch_layout.of_second(site, second), b)
        np.testing.assert_array_equal(torch_layout.of_flat(site, torch_layout.flat(site, a)), a)


def test_methods_without_a_layout_of_convolutions_are_refused(tmp_path):
    made = {
        method: jl.init(jax.random.key(0), model(), params(), X, methods={"two/kernel": method})
        for method in (jl.HiRA(2), jl.OFT(block=3))
    }
    for method, adapter in made.items():
        moved = adapter.replace(trainable=jax.tree.map(lambda t: t + 1, adapter.trainable))
        for save, words in ((jl.io.save_peft, " of a convolution"), (jl.io.save_kohya, "")):
            with pytest.raises(FormatError, match=f"{type(method).__name__}{words}"):
                save(tmp_path / "x", moved, NAMES)
    grouped = jl.Site("two/kernel", (3, 2, 1, 4), "iiio", jnp.dtype("float32"), ("conv",))
    with pytest.raises(FormatError, match=r"not a site|expected"):
        jl.io.load_peft(GOLDEN / "lora", NAMES, [grouped])
    assert not (tmp_path / "x").exists()


def test_mutation_channels_and_window_swapped_are_seen(monkeypatch):
    good = torch_layout._patch
    monkeypatch.setattr(torch_layout, "_patch", lambda site: (*good(site)[:2], False))
    want = safetensors_file.read(GOLDEN / "lora" / "expected.safetensors")[0]["expected"]
    adapter = jl.io.load_peft(GOLDEN / "lora", NAMES, sites())
    assert error(model()(jl.merge(params(), adapter), X), want) > 1e-3

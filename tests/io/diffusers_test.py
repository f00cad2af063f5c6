"""LoRA files of the real diffusers: its deltas, the same bits back, and our files in its U-Net.

The U-Net itself is not rebuilt here: every module's delta is compared. Where diffusers is there,
the weights with our deltas merged and the U-Net that loads our file compute the same.
"""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.site import unfold
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.peft import lora as peft_lora
from tests.io.shared import error

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "third_party" / "diffusers"
FILE = "pytorch_lora_weights.safetensors"
WEIGHTS, _ = safetensors_file.read(GOLDEN / "base.safetensors")
BASE_OUTPUT = WEIGHTS.pop("output")
NAMES = NameMap({r"(.*)/kernel": r"\1"})
ADAPTERS = {"lora": "unet", "patterns": "unet", "dora": "unet", "untold": "unet", "bare": ""}


def kernel(t):
    """torch's [out, in, *window] as [*window, in, out]."""
    return np.moveaxis(t, (0, 1), (-1, -2))


def site(module, t):
    shape, conv = kernel(t).shape, t.ndim > 2
    ops, kinds = ("conv",) if conv else ("dot",), "i" * (t.ndim - 1) + "o"
    return jl.Site(f"{module}/kernel", shape, kinds, jnp.dtype(t.dtype), ops)


SITES = [site(*item) for item in WEIGHTS.items()]
PARAMS = {module: {"kernel": jnp.asarray(kernel(t))} for module, t in WEIGHTS.items()}


def load(path, component):
    return jl.io.load_diffusers(path, NAMES, SITES, component)


def effects(adapter):
    """Module -> delta [out, in, *window], or with magnitudes the merged weight."""
    dora = isinstance(adapter.sites[0][1], jl.DoRA)
    if dora:
        merged = jl.merge(PARAMS, adapter)
        made = {module: np.asarray(merged[module]["kernel"]) for module in WEIGHTS}
    else:
        deltas = jl.delta(PARAMS, adapter)
        made = {
            s.path.removesuffix("/kernel"): np.asarray(unfold(deltas[s.path], s.kinds, s.shape))
            for s, _ in adapter.sites
        }
    return {module: np.moveaxis(t, (-1, -2), (0, 1)) for module, t in made.items()}


def check_value(name):
    want, _ = safetensors_file.read(GOLDEN / name / "expected.safetensors")
    assert error(want.pop("output"), BASE_OUTPUT) > 1e-3
    adapter = load(GOLDEN / name / FILE, ADAPTERS[name])
    assert {type(m) for _, m in adapter.sites} == {jl.DoRA if name == "dora" else jl.LoRA}
    got = effects(adapter)
    assert got.keys() == want.keys() == WEIGHTS.keys()
    for module, t in want.items():
        assert error(got[module], t) <= 1e-5, module
    return adapter


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_has_the_deltas_of_diffusers_and_goes_back_bitwise(name, tmp_path):
    adapter = check_value(name)
    jl.io.save_diffusers(tmp_path / FILE, adapter, NAMES, ADAPTERS[name])
    ours, header = safetensors_file.read(tmp_path / FILE)
    theirs, told = safetensors_file.read(GOLDEN / name / FILE)
    assert ours.keys() == theirs.keys() and header["format"] == told["format"]
    for key, want in theirs.items():
        assert ours[key].dtype == want.dtype and ours[key].shape == want.shape
        assert ours[key].tobytes() == want.tobytes(), key
    if name != "untold":  # of the fields that give the function
        start = ADAPTERS[name] and f"{ADAPTERS[name]}."
        configs = [json.loads(h["lora_adapter_metadata"]) for h in (header, told)]
        for field in ("peft_type", "use_dora", "use_rslora"):
            assert configs[0][start + field] == configs[1][start + field]
    back = load(tmp_path / FILE, ADAPTERS[name])
    again = effects(back)
    for module, t in effects(adapter).items():
        np.testing.assert_array_equal(again[module], t)


def test_golden_files_are_those_of_the_metadata():
    lines = (GOLDEN / "METADATA").read_text().split("sha256:\n")[1].splitlines()
    listed = dict(reversed(line.split()) for line in lines)
    found = {
        str(p.relative_to(GOLDEN)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in GOLDEN.rglob("*.safetensors")
    }
    assert listed == found


def test_keys_without_a_component_are_told_from_others(tmp_path):
    with pytest.raises(FormatError, match="has keys of other components"):
        load(GOLDEN / "bare" / FILE, "unet")
    with pytest.raises(FormatError, match="is not a site of this model"):
        load(GOLDEN / "untold" / FILE, "")


def moved(adapter):
    rng = np.random.default_rng(0)
    noisy = {
        path: {k: t + jnp.asarray(0.1 * rng.normal(size=t.shape), t.dtype) for k, t in p.items()}
        for path, p in adapter.trainable.items()
    }
    return adapter.replace(trainable=noisy)


@pytest.mark.parametrize("name", ADAPTERS)
def test_real_diffusers_computes_what_we_write(name, tmp_path, monkeypatch):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_diffusers

    adapter, component = moved(load(GOLDEN / name / FILE, ADAPTERS[name])), ADAPTERS[name]
    jl.io.save_diffusers(tmp_path / FILE, adapter, NAMES, component)
    merged, loaded = make_diffusers.unet(), make_diffusers.loaded(tmp_path, component)
    made = effects(adapter)
    with torch.no_grad():
        for module, t in made.items():
            weight = merged.get_submodule(module).weight
            new = torch.from_numpy(np.ascontiguousarray(t))
            weight.copy_(new if name == "dora" else weight + new)
        outputs = [m(*make_diffusers.inputs()).sample.numpy() for m in (merged, loaded)]
    assert error(outputs[0], BASE_OUTPUT) > 1e-3
    assert error(outputs[1], outputs[0]) <= 1e-5


def test_real_diffusers_has_our_scales_of_alphas(tmp_path, monkeypatch):
    """`.alpha` keys, which its loaders take out of a file and hand on as `network_alphas`."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_diffusers

    tensors, _ = safetensors_file.read(GOLDEN / "untold" / FILE)
    alphas = {}
    for number, key in enumerate(sorted(k for k in tensors if k.endswith(".lora_A.weight"))):
        alphas[key.replace("lora_A.weight", "alpha")] = np.asarray(1.0 + number % 3, np.float32)
    safetensors_file.write(tmp_path / FILE, tensors | alphas, {"format": "pt"})
    made = effects(load(tmp_path / FILE, "unet"))
    theirs = make_diffusers.unet()
    state = {key: torch.from_numpy(t) for key, t in tensors.items()}
    given = {key: float(alpha) for key, alpha in alphas.items()}
    theirs.load_lora_adapter(state, "unet", network_alphas=given, adapter_name="default")
    found = make_diffusers.layers(theirs)
    assert found.keys() == made.keys()
    with torch.no_grad():
        for module, layer in found.items():
            assert error(made[module], make_diffusers.effect(layer).numpy()) <= 1e-5, module


def test_mutation_a_scale_left_out_is_seen(monkeypatch):
    monkeypatch.setattr(peft_lora, "scale_of", lambda alpha, rank, *_: np.float32(1))
    check_value("untold")  # its scale is 1
    for name in ("lora", "patterns", "dora", "bare"):
        with pytest.raises(AssertionError):
            check_value(name)

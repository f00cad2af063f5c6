"""Files that the real LyCORIS wrote: its outputs, and the same bits back."""

import hashlib
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import NameMap, safetensors_file
from jlora.io.peft import lora as peft_lora
from tests.io.shared import error

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "third_party" / "lycoris"
STATE, _ = safetensors_file.read(GOLDEN / "base.safetensors")
NAMES = NameMap({r"blocks/(up_proj|down)/kernel": r"blocks.{i}.\1"})
METHODS = {"lora": jl.LoRA, "dora": jl.DoRA, "loha": jl.LoHa, "lokr": jl.LoKr, "lokr_both": jl.LoKr}
BY_INPUT = ("dora_in", "doha_in", "dokr_in")
METHODS |= dict.fromkeys(("doha", "dokr", "dokr_whole", *BY_INPUT), jl.Decomposed)
X = jnp.asarray(STATE["x"])


def stacked(name):
    both = np.stack([STATE[f"blocks.{i}.{name}"] for i in range(2)])
    return jnp.asarray(both.swapaxes(1, 2) if both.ndim == 3 else both)


PARAMS = {
    "blocks": {
        "up_proj": {"kernel": stacked("up_proj.weight"), "bias": stacked("up_proj.bias")},
        "down": {"kernel": stacked("down.weight")},
    }
}


def model(params, x):
    def block(x, p):
        h = jnp.tanh(x @ p["up_proj"]["kernel"] + p["up_proj"]["bias"][None])
        return x + h @ p["down"]["kernel"], None

    return jax.lax.scan(block, x, params["blocks"])[0]


def load(path):
    return jl.io.load_kohya(path, NAMES, PARAMS, "lycoris", layout="in_out")


def check_value(name):
    want = safetensors_file.read(GOLDEN / f"{name}.expected.safetensors")[0]["expected"]
    assert error(model(PARAMS, X), STATE["expected"]) <= 1e-5 < 1e-3 < error(model(PARAMS, X), want)
    adapter = load(GOLDEN / f"{name}.safetensors")
    assert {type(m) for _, m in adapter.sites} == {METHODS[name]}
    assert {getattr(m, "by", "out") == "in" for _, m in adapter.sites} == {name in BY_INPUT}
    assert error(jl.lift(model)(PARAMS, adapter, X), want) <= 1e-5
    assert error(model(jl.merge(PARAMS, adapter), X), want) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_it_computes_what_lycoris_computes(name):
    check_value(name)


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_back_bitwise(name, tmp_path):
    adapter = load(GOLDEN / f"{name}.safetensors")
    jl.io.save_kohya(tmp_path / "x.safetensors", adapter, NAMES, "lycoris")
    ours, _ = safetensors_file.read(tmp_path / "x.safetensors")
    theirs, _ = safetensors_file.read(GOLDEN / f"{name}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
        assert ours[key].dtype == want.dtype and ours[key].shape == want.shape
        np.testing.assert_array_equal(ours[key], want)


def test_golden_files_are_those_of_the_metadata():
    lines = (GOLDEN / "METADATA").read_text().split("sha256:\n")[1].splitlines()
    listed = dict(reversed(line.split()) for line in lines)
    found = {
        str(p.relative_to(GOLDEN)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in GOLDEN.rglob("*.safe*")
    }
    assert listed == found


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", *BY_INPUT])
def test_real_lycoris_reads_what_we_write(name, tmp_path, monkeypatch):
    torch, lycoris = pytest.importorskip("torch"), pytest.importorskip("lycoris")
    script = ROOT / "tests" / "golden" / "make_lycoris.py"
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("make_lycoris", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    base = make.Model()
    base.load_state_dict({k: torch.from_numpy(STATE[k]) for k in base.state_dict()})
    adapter = load(GOLDEN / f"{name}.safetensors")
    adapter = adapter.replace(trainable=jax.tree.map(lambda t: 1.1 * t, adapter.trainable))
    path = tmp_path / "x.safetensors"
    jl.io.save_kohya(path, adapter, NAMES, "lycoris")
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_MODULE", ["Block"])  # back after it
    options = {"linear_dim": 2, "linear_alpha": 3.0, **make.ADAPTERS[name]}
    network = lycoris.create_lycoris(base, 1.0, **options)
    network.apply_to()
    network.load_weights(str(path))
    with torch.no_grad():
        theirs = base(torch.from_numpy(STATE["x"])).numpy()
    assert error(jl.lift(model)(PARAMS, adapter, X), theirs) <= 1e-5


def test_mutation_a_scale_left_out_is_seen(monkeypatch):
    monkeypatch.setattr(peft_lora, "scale_of", lambda alpha, rank, *_: np.float32(1))
    with pytest.raises(AssertionError):
        check_value("lora")

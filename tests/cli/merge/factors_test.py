"""mergekit's parameters on adapters that stay adapters: honoured as there, or refused by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from jlora.cli.merge import factors, mergekit
from jlora.cli.merge import main as command
from jlora.cli.merge.values import ConfigError
from jlora.io import safetensors_file
from jlora.merging import METHODS

GOLDEN = Path(__file__).parents[3] / "third_party/mergekit"
MODELS = GOLDEN / "models"
SITES = [f"model.layers.{k}.{m}" for k in range(3) for m in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture
def job(tmp_path):
    """job(method, ...) merges the two LoRAs; returns (status, target)."""

    def run(method, *flags, each=({}, {}), out=None, base=True, **changes):
        config = {
            "merge_method": method,
            "models": [{"model": str(MODELS / f"lora_{k}"), "parameters": dict(p)}
                       for k, p in zip("ab", each, strict=True)],
            "out": {"path": "out", **(out or {})},
            **({"base_model": str(MODELS / "base")} if base else {}),
            **changes,
        }  # fmt: skip
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
        argv = ["--config", str(tmp_path / "merge.yaml"), "--overwrite", *flags]
        return command.main(argv), tmp_path / "out"

    return run


def delta(folder, module):
    """What a LoRA adds to a torch weight [out, in], by numpy."""
    t, _ = safetensors_file.read(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (t[f"base_model.model.{module}.lora_{k}.weight"].astype(float) for k in "AB")
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return alpha / a.shape[0] * b @ a


def ties(x, w, density, normalize):
    """By mergekit's definition, dense, in float64."""
    y = []
    for d, c in zip(x, w, strict=True):
        order = np.sort(np.abs(d), axis=None)[::-1]
        y.append(c * np.where(np.abs(d) >= order[int(density * d.size) - 1], d, 0))
    y = np.stack(y)
    agree = np.sign(y) == np.where(y.sum(0) >= 0, 1, -1)
    share = (agree * np.reshape(w, (-1, 1, 1))).sum(0)
    return (y * agree).sum(0) / (np.where(share == 0, 1, share) if normalize else 1)


W = (0.7, 0.4)
BOTH = tuple({"weight": w} for w in W)
HALF = {"density": 0.5}


@pytest.mark.parametrize("normalize", [True, False])
def test_normalize_is_the_divisor_of_ties(normalize, job):
    """In factors of full rank, and dense in merged weights."""
    parameters = {**HALF, "normalize": normalize}
    assert job("ties", each=BOTH, parameters={**parameters, "rank": 8})[0] == 0
    for form in ("peft", "merged"):
        rank = {"rank": 8} if form == "peft" else {}
        status, out = job("ties", each=BOTH, parameters=parameters | rank, out={"format": form})
        assert status == 0
        for module in SITES:
            x = [delta(MODELS / f"lora_{k}", module) for k in "ab"]
            want = ties(x, W, 0.5, normalize)
            if form == "peft":
                got = delta(out, module)
            else:
                new, old = (safetensors_file.read(f / "model.safetensors")[0][f"{module}.weight"]
                            for f in (out, MODELS / "base"))  # fmt: skip
                got = new.astype(float) - old
            np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max() + 1e-6)


def test_the_error_of_a_cut_adapter_is_said(job, capsys):
    """By site and in total, in the dry run too, and in merge.json; equal to numpy's."""
    each, parameters = BOTH, {**HALF, "rank": 2}
    status, out = job("ties", each=each, parameters=parameters)
    told = capsys.readouterr().out
    assert status == 0
    found = json.loads((out / "merge.json").read_text())
    total, norms = 0.0, 0.0
    for module in SITES:
        want = ties([delta(MODELS / f"lora_{k}", module) for k in "ab"], W, 0.5, True)
        error = found["errors"][f"{module}/kernel"]
        gap = np.linalg.norm(want - delta(out, module))
        assert error["rank"] == 2 and error["full"] == min(want.shape)
        np.testing.assert_allclose(error["error"], gap, rtol=1e-4)
        np.testing.assert_allclose(error["share"], gap / np.linalg.norm(want), rtol=1e-4)
        total, norms = total + gap**2, norms + np.linalg.norm(want) ** 2
    share = re.search(r"^error .* in total \(([\d.]+)%\)$", told, re.M)
    np.testing.assert_allclose(float(share[1]), 100 * np.sqrt(total / norms), atol=6e-3)
    assert job("ties", "--dry_run", each=each, parameters=parameters)[0] == 0
    dry = capsys.readouterr().out
    assert f"in total ({share[1]}%)" in dry
    assert "density=0.5" in dry and "rank=2" in dry and "scale=1.0" in dry
    first = found["parameters"][0]["options"]
    assert (first["density"], first["rank"], first["scale"], first["vote"]) == (0.5, 2, 1.0, "sum")


def test_what_out_rank_cuts_off_an_exact_sum_is_said(job, capsys):
    assert job("concat", each=BOTH, out={"rank": 1})[0] == 0
    out = capsys.readouterr().out
    gaps = norms = 0.0
    for module in SITES:
        total = sum(w * delta(MODELS / f"lora_{k}", module) for w, k in zip(W, "ab", strict=True))
        s = np.linalg.svd(total, compute_uv=False)
        gaps, norms = gaps + (s[1:] ** 2).sum(), norms + (s**2).sum()
    assert f"({np.sqrt(gaps / norms):.2%})" in out.split("in total")[1]


def test_a_rank_beyond_a_site_means_full_there(job, capsys):
    """q_proj is 8 x 8, down_proj 8 x 12: the larger of the full ranks is 8; of kv it would be 4."""
    assert job("ties", each=BOTH, parameters={**HALF, "rank": 8})[0] == 0
    assert "(0.00%)" in capsys.readouterr().out.split("in total")[1]
    for changes in ({"parameters": {**HALF, "rank": 100000}}, {"out": {"rank": 100000}}):
        status, _ = job("ties", each=BOTH, **changes)
        assert status == 2
        assert "rank: got 100000, expected 8 at most, the full rank" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["magnitude", "consensus"])
def test_other_elementwise_methods_are_dense_in_merged_weights(method, job):
    """No file of mergekit has them, and nothing is cut either: full rank, unlike the factors."""
    more = {"density": 0.3} if method == "magnitude" else {"least": 2}
    status, out = job(method, each=BOTH, parameters=more, out={"format": "merged"})
    assert status == 0
    w = np.reshape(W, (2, 1, 1))
    for module in SITES:
        x = np.stack([delta(MODELS / f"lora_{k}", module) for k in "ab"])
        if method == "magnitude":
            keep = [np.sort(np.abs(d), axis=None)[-int(0.3 * d.size)] for d in x]
            want = (w * np.where(np.abs(x) >= np.reshape(keep, (2, 1, 1)), x, 0)).sum(0)
        else:
            total = (w * x).sum(0)
            uses = np.abs(x) >= 0.4 * np.abs(total - x)
            want = np.where(uses.sum(0) >= 2, total, 0)
        new, old = (safetensors_file.read(f / "model.safetensors")[0][f"{module}.weight"]
                    for f in (out, MODELS / "base"))  # fmt: skip
        np.testing.assert_allclose(new.astype(float) - old, want, atol=2e-6)


REFUSED = {
    "unknown method": ({"method": "add"}, "concat is the exact weighted sum, of weights 1"),
    "near": ({"method": "tie"}, "instead: ties"),
    "a method of mergekit alone": ({"method": "arcee_fusion"}, "instead: thresholds by"),
    "unknown option": (
        {"method": "ties", "parameters": {"densty": 0.5}},
        "parameters.densty: ties has no such parameter; it has ['density', 'int8_mask', 'lambda'",
    ),
    "the other spelling": (
        {"method": "ties", "parameters": {"normalise": False}},
        "no such parameter (it is normalize)",
    ),
    "of a model": (
        {"method": "ties", "each": ({"normalize": True}, {})},
        "models[0].parameters.normalize: one value for all models",
    ),
    "unknown of the library": (
        {"method": "knots", "parameters": {"lambda": 1}},
        "parameters.lambda: knots has no such option; it has ['density'",
    ),
    "weights of model_stock": (
        {"method": "model_stock", "each": BOTH},
        "models[0].parameters.weight: model_stock has no such parameter (mergekit leaves it unread",
    ),
    "weights of sce": ({"method": "sce", "each": BOTH}, "the models count alike"),
    "negative": (
        {"method": "ties", "each": ({"weight": 1.0}, {"weight": -0.5})},
        "weight: model.layers.0.mlp.down_proj/kernel: got -0.5; with normalize",
    ),
    "density": (
        {"method": "ties", "each": ({"density": 0.5}, {"density": float("nan")})},
        "models[1].parameters.density: got nan, expected a number in (0, 1]",
    ),
    "kind": (
        {"method": "ties", "parameters": {"normalize": "no"}},
        "parameters.normalize: got 'no', expected true or false",
    ),
    "karcher": ({"method": "karcher"}, "mean of whole weights in mergekit, which is no adapter"),
    "linear": (
        {"method": "linear", "each": BOTH, "parameters": {"normalize": False}},
        "the sum is 1.1, which multiplies the base as well",
    ),
    "nearswap": ({"method": "nearswap", "parameters": {"t": 0.1}}, "no adapter is its result"),
    "rescale": ({"method": "ties", "parameters": {"rescale": True}}, "parameters.rescale"),
    "modules": ({"method": "ties", "modules": {}}, "modules: not supported"),
    "chat_template": ({"method": "ties", "chat_template": "auto"}, "chat_template: not supported"),
    "dtype": ({"method": "ties", "dtype": "float64"}, "dtype: got 'float64', expected one of"),
    "two dtypes": (
        {"method": "ties", "out_dtype": "float16", "out": {"dtype": "float32"}},
        "out_dtype, out.dtype: got 'float16' and 'float32'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, job, capsys):
    changes, text = REFUSED[name]
    status, out = job(**changes)
    told = capsys.readouterr().err
    assert status == 2 and text in told, told
    assert not out.exists()


def test_negative_weights_keep_their_sign_where_nothing_divides(job):
    each = ({"weight": 0.0}, {"weight": -1.0})
    parameters = {"normalize": False, "rank": 8}
    status, out = job("ties", each=each, parameters=parameters)
    assert status == 0
    for module in SITES:
        want = -delta(MODELS / "lora_b", module)
        np.testing.assert_allclose(delta(out, module), want, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "passthrough"])
def test_sums_that_are_adapters(name, job):
    """linear divides by the sum of weights, as mergekit does; passthrough is one adapter."""
    if name == "linear":
        status, out = job("linear", each=BOTH, base=False)
        c = np.asarray(W) / sum(W)
    else:
        one = [{"model": str(MODELS / "lora_a")}]
        status, out = job("passthrough", base=False, models=one)
        c = (1.0, 0.0)
    assert status == 0
    for module in SITES:
        want = sum(w * delta(MODELS / f"lora_{k}", module) for w, k in zip(c, "ab", strict=True))
        np.testing.assert_allclose(delta(out, module), want, atol=1e-6)


def test_passthrough_takes_one_adapter_as_mergekit_does(job, capsys):
    status, out = job("passthrough", base=False)
    assert status == 2 and not out.exists()
    assert "models: got 2, expected 1: passthrough" in capsys.readouterr().err


def test_slerp_and_karcher_of_adapters_themselves(job):
    """t is the weight of the second; the mean of deltas has a name of its own."""
    first = job("slerp", base=False, parameters={"t": 0.25})[1]
    t = {m: delta(first, m) for m in SITES}
    each = ({"weight": 0.75}, {"weight": 0.25})
    again = job("slerp", base=False, each=each)[1]
    for module in SITES:
        np.testing.assert_allclose(delta(again, module), t[module], atol=1e-6)
    assert job("karcher", base=False, parameters={"space": "delta"})[0] == 0


def test_every_method_translates_its_defaults():
    for name in mergekit.METHODS:
        method = factors.method_of(name)
        assert method is not None
        shared, each = [("parameters", {"t": 0.5})], [[("parameters", {})]] * 2
        number = 1 if name == "passthrough" else 2
        options = mergekit.resolved(method, shared, each[:number], "x", 0.0)
        try:
            _, found = factors.translated(method, factors.row_of(name), options, number, "x")
        except ConfigError:
            assert name in ("karcher", "nearswap")
            continue
        assert found.keys() <= factors.options_of(factors.row_of(name)).keys(), name
    assert {"linear", "passthrough"}.isdisjoint(METHODS)

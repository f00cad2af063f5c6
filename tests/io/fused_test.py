"""Fused query, key and value in a file, split in the model: exact, by numpy and by diffusers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file

RNG = np.random.default_rng(0)
SIZES = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}  # of 16 outputs
RULES = {f"attn/{n}": f"blocks.0.qkv[{a}:{b}]" for n, (a, b) in SIZES.items()}
NAMES = NameMap(RULES)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


W = draw(16, 6)  # torch's, [out, in]
PARAMS = {"attn": {n: jnp.asarray(W[a:b].T) for n, (a, b) in SIZES.items()}}
A, B, M = draw(2, 6), draw(16, 2), draw(16)
H = {"hada_w1_a": draw(16, 2), "hada_w1_b": draw(2, 6), "hada_w2_a": draw(16, 2),
     "hada_w2_b": draw(2, 6)}  # fmt: skip
LORA = {"lora_A.weight": A, "lora_B.weight": B}
DOWN = {"lora_down.weight": A, "lora_up.weight": B}
SUM = W + 1.5 * B.astype(np.float64) @ A


def dora(merged):
    return merged * M[:, None] / np.linalg.norm(merged, axis=1, keepdims=True)


HADA = W + 1.5 * (H["hada_w1_a"] @ H["hada_w1_b"]) * (H["hada_w2_a"] @ H["hada_w2_b"])
CASES = {  # reader, tensors, merged [out, in]
    "peft": (LORA, SUM),
    "peft_dora": ({**LORA, "lora_magnitude_vector": M}, dora(SUM)),
    "kohya": (DOWN, SUM),
    "kohya_dora": ({**DOWN, "dora_scale": M[:, None]}, dora(SUM)),
    "kohya_loha": (H, HADA),
    "diffusers": (LORA, SUM),
    "diffusers_dotted": (DOWN, SUM),
}


def load(case, folder, tensors, names=NAMES):
    reader = case.split("_")[0]
    path = folder / "adapter_model.safetensors"
    key = {"peft": "base_model.model.blocks.0.qkv", "kohya": "lora_unet_blocks_0_qkv"}.get(
        reader, "transformer.blocks.0.qkv"
    )
    keyed = {f"{key}.{suffix}": t for suffix, t in tensors.items()}
    if reader != "peft":
        keyed[f"{key}.alpha"] = np.asarray(3, np.float32)
    safetensors_file.write(path, keyed, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 7, "rank_pattern": {"qkv": 2}, "lora_alpha": 3}
    config |= {"target_modules": ["qkv"], "use_dora": "lora_magnitude_vector" in tensors}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    where = folder if reader == "peft" else path
    return getattr(jl.io, f"load_{reader}")(where, names, PARAMS, layout="in_out")


@pytest.mark.parametrize("case", CASES)
def test_each_site_has_its_outputs(case, tmp_path):
    tensors, want = CASES[case]
    merged = jl.merge(PARAMS, load(case, tmp_path, tensors))["attn"]
    for name, (start, stop) in SIZES.items():
        np.testing.assert_allclose(merged[name].T, want[start:stop], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["peft", "kohya", "diffusers"])
def test_parts_that_do_not_fit_are_refused(case, tmp_path):
    tensors, _ = CASES[case]
    for rules, why in (
        ({**RULES, "attn/k": "blocks.0.qkv[7:12]"}, "expected each output in one of them"),
        ({k: r for k, r in RULES.items() if k != "attn/k"}, "expected each output in one of them"),
        ({k: r for k, r in RULES.items() if k != "attn/v"}, "the name map's parts have 12 outputs"),
    ):
        with pytest.raises(FormatError, match=why):
            load(case, tmp_path, tensors, NameMap(rules))


def test_methods_whose_outputs_mix_are_refused(tmp_path):
    whole = {"lokr_w1": draw(4, 2), "lokr_w2": draw(4, 3)}
    with pytest.raises(FormatError, match=r"lokr_w\d mixes the outputs of a fused module"):
        load("kohya", tmp_path, whole)
    with pytest.raises(FormatError, match="dora_scale has shape"):
        load("kohya", tmp_path, {**DOWN, "dora_scale": draw(1, 6)})


def test_parts_are_for_reading(tmp_path):
    adapter = load("peft", tmp_path, LORA)
    for save in (jl.io.save_peft, jl.io.save_kohya, jl.io.save_diffusers):
        with pytest.raises(
            ValueError, match=r"part or sum .blocks.0.qkv.*of fused modules are for reading"
        ):
            save(tmp_path / "x", adapter, NAMES)
    assert not (tmp_path / "x").exists()
    own = NameMap({r"attn/(\w)": r"blocks.0.to_\1"})
    jl.io.save_diffusers(tmp_path / "y.safetensors", adapter, own)
    back = jl.io.load_diffusers(tmp_path / "y.safetensors", own, PARAMS, layout="in_out")
    got = jl.merge(PARAMS, back)["attn"]["v"].T
    np.testing.assert_allclose(got, SUM[12:], rtol=1e-4, atol=1e-5)


def test_mutation_another_part_is_seen(tmp_path):
    turned = {**RULES, "attn/k": RULES["attn/v"], "attn/v": RULES["attn/k"]}
    merged = jl.merge(PARAMS, load("peft", tmp_path, LORA, NameMap(turned)))["attn"]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(merged["k"].T, SUM[8:12], rtol=1e-2)


JOINED = NameMap({"qkv": "blocks.0.to_q + blocks.0.to_k + blocks.0.to_v"})
WHOLE = {"qkv": jnp.asarray(W.T)}
RANKS = {"q": 2, "k": 1, "v": 3}


def split_file(case, folder, names="qkv", dora=False, alphas=(3.0, 1.0, 3.0)):
    """A file of the modules to_q, to_k, to_v, and W + their deltas, or what DoRA makes of it."""
    reader = case.split("_")[0]
    key = {"peft": "base_model.model.blocks.0.to_", "kohya": "lora_unet_blocks_0_to_"}.get(
        reader, "transformer.blocks.0.to_"
    )
    dotted = reader == "kohya" or case.endswith("dotted")
    ends = ("lora_down.weight", "lora_up.weight") if dotted else tuple(LORA)
    tensors, merged, rows = {}, W.astype(np.float64), []
    for name, alpha in zip("qkv", alphas, strict=True):
        start, stop = SIZES[name]
        a, b, m = draw(RANKS[name], 6), draw(stop - start, RANKS[name]), draw(stop - start)
        rows.append(m)
        if name not in names:
            continue
        tensors |= {f"{key}{name}.{ends[0]}": a, f"{key}{name}.{ends[1]}": b}
        if dora:
            end, shape = ("dora_scale", (-1, 1)) if dotted else ("lora_magnitude_vector", (-1,))
            tensors[f"{key}{name}.{end}"] = m.reshape(shape)
        if reader != "peft":
            tensors[f"{key}{name}.alpha"] = np.asarray(alpha, np.float32)
        merged[start:stop] += alpha / RANKS[name] * (b.astype(np.float64) @ a)
    if dora:
        merged *= np.concatenate(rows)[:, None] / np.linalg.norm(merged, axis=1, keepdims=True)
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 7, "rank_pattern": {f"to_{n}": RANKS[n] for n in names}}
    config |= {"alpha_pattern": {f"to_{n}": x for n, x in zip("qkv", alphas, strict=True)}}
    config |= {"use_dora": dora, "target_modules": [f"to_{n}" for n in names]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def load_joined(case, folder):
    reader = case.split("_")[0]
    path = folder if reader == "peft" else folder / "adapter_model.safetensors"
    return getattr(jl.io, f"load_{reader}")(path, JOINED, WHOLE, layout="in_out")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", ["peft", "kohya", "diffusers", "diffusers_dotted"])
def test_modules_of_a_file_are_one_site(case, dora, tmp_path):
    """Of other ranks and scales, and with one of them missing where it has no magnitude."""
    for alphas in ((3.0, 1.0, 3.0), (4.0, 2.0, 6.0)):
        want = split_file(case, tmp_path, dora=dora, alphas=alphas)
        adapter = load_joined(case, tmp_path)
        assert [(s.path, m.rank) for s, m in adapter.sites] == [("qkv", 6)]
        got = jl.merge(WHOLE, adapter)["qkv"].T
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    want = split_file(case, tmp_path, "qv", dora)
    if dora:
        with pytest.raises(FormatError, match="lacks the magnitudes of 4 outputs"):
            load_joined(case, tmp_path)
    else:
        got = jl.merge(WHOLE, load_joined(case, tmp_path))["qkv"].T
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    split_file(case, tmp_path, "q", dora)
    with pytest.raises(FormatError, match="expected at most one module less"):
        load_joined(case, tmp_path)


def test_a_module_that_the_config_targets_is_not_taken_for_zero(tmp_path):
    split_file("peft", tmp_path, "qv")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"].append("to_k")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"lacks tensors of \['blocks.0.to_k'\]"):
        load_joined("peft", tmp_path)


def test_a_prefix_is_before_every_module_of_a_sum():
    assert JOINED.replace(prefix="m.").module("qkv") == (
        "m.blocks.0.to_q + m.blocks.0.to_k + m.blocks.0.to_v"
    )

"""`jlora inspect`: its figures against dense NumPy, for every format, bank and method."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora as jl
from jlora.cli import inspect

ROOT = Path(__file__).parents[2] / "third_party"
LLAMA = ROOT / "peft" / "llama"


def shown(capsys, *words, status=0):
    assert inspect.main([str(w) for w in words]) == status
    return capsys.readouterr().out


def sites(capsys, *words):
    return {r["site"]: r for r in json.loads(shown(capsys, *words, "--json"))["sites"]}


def test_figures_of_a_lora_against_dense_numpy(capsys):
    tensors = load_file(LLAMA / "lora" / "adapter_model.safetensors")
    config = json.loads((LLAMA / "lora" / "adapter_config.json").read_text())
    rows = sites(capsys, LLAMA / "lora")
    downs = [k for k in tensors if k.endswith("lora_A.weight")]
    assert len(rows) == len(downs)
    for key in downs:
        a, b = (tensors[k].astype("f8") for k in (key, key.replace("lora_A", "lora_B")))
        s = np.linalg.svd(b @ a * config["lora_alpha"] / config["r"], compute_uv=False)
        site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + "/kernel"
        row = rows[site]
        assert (row["rank"], row["alpha"]) == (config["r"], config["lora_alpha"])
        assert row["parameters"] == a.size + b.size
        np.testing.assert_allclose(row["norm"], np.sqrt((s**2).sum()), rtol=1e-5)
        np.testing.assert_allclose(row["top"], s[0], rtol=1e-5)
        np.testing.assert_allclose(row["stable_rank"], (s**2).sum() / s[0] ** 2, rtol=1e-5)


def test_a_method_without_factors_needs_the_base(capsys):
    assert "6 sites need --base" in shown(capsys, LLAMA / "dora")
    rows = sites(capsys, LLAMA / "dora", "--base", LLAMA / "base")
    base = load_file(LLAMA / "base" / "model.safetensors")
    tensors = load_file(LLAMA / "dora" / "adapter_model.safetensors")
    config = json.loads((LLAMA / "dora" / "adapter_config.json").read_text())
    for site, row in rows.items():
        module = site.removesuffix("/kernel")
        a, b, m = (
            tensors[f"base_model.model.{module}.{k}"].astype("f8")
            for k in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        w = base[f"{module}.weight"].astype("f8")
        v = w + b @ a * config["lora_alpha"] / config["r"]
        delta = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
        np.testing.assert_allclose(row["norm"], np.linalg.norm(delta), rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "kind", "count"),
    [
        (ROOT / "lycoris" / "lora.safetensors", "kohya", 4),
        (ROOT / "diffusers" / "lora" / "pytorch_lora_weights.safetensors", "diffusers", 41),
        (ROOT / "peft" / "bert" / "lora", "peft", 6),
    ],
)
def test_the_format_and_what_is_in_it_are_recognised(capsys, path, kind, count):
    assert f"{kind} adapter: {count} sites, LoRA" in shown(capsys, path)


@pytest.fixture
def bank(tmp_path):
    params, x = {"w": jnp.ones((6, 5)), "v": jnp.ones((5, 4))}, jnp.ones((2, 6))

    def one(seed):
        adapter = jl.init(jax.random.key(seed), lambda p, x: x @ p["w"] @ p["v"], params, x,
                          methods={"[wv]": jl.LoRA(rank=2, alpha=4.0)})  # fmt: skip
        rng = np.random.default_rng(seed)
        noise = jax.tree.map(
            lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype), adapter.trainable
        )
        return adapter.replace(trainable=noise)

    adapters = [one(0), one(1), one(0)]
    jl.io.save_adapter(tmp_path / "bank", jl.stack(adapters))
    return tmp_path / "bank", adapters


def test_a_bank_shows_means_and_similarities(capsys, bank):
    path, adapters = bank
    data = json.loads(shown(capsys, path, "--json"))
    assert data["bank"] == 3 and data["format"] == "orbax"
    dense = [
        {k: np.asarray(a.trainable[k]["a"] @ a.trainable[k]["b"] * 2.0, "f8") for k in "vw"}
        for a in adapters
    ]
    for row in data["sites"]:
        norms = [np.linalg.norm(d[row["site"]]) for d in dense]
        np.testing.assert_allclose(row["norm"], np.mean(norms), rtol=1e-5)
    flat = np.stack([np.concatenate([d[k].ravel() for k in "vw"]) for d in dense])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(data["cosines"], flat @ flat.T, atol=1e-5)
    assert "bank of 3 adapters" in shown(capsys, path)


def test_rows_can_be_sorted_and_cut(capsys):
    norms = [r["norm"] for r in sites(capsys, LLAMA / "lora", "--sort", "norm").values()]
    assert norms == sorted(norms, reverse=True)
    assert len(sites(capsys, LLAMA / "lora", "--sort", "norm", "--top", "2")) == 2


def test_the_plot_is_a_picture_of_all_sites(tmp_path, capsys, bank):
    for path in (LLAMA / "lora", bank[0]):
        shown(capsys, path, "--plot", tmp_path / "new" / "plot.png")
        assert (tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert inspect.main([str(LLAMA / "dora"), "--plot", str(tmp_path / "none.png")]) == 2
    assert "give --base" in capsys.readouterr().err and not (tmp_path / "none.png").exists()


def test_what_is_no_adapter_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "empty", LLAMA / "base" / "model.safetensors"):
        assert inspect.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1

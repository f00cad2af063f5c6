"""`jlora convert`: every pair of formats, back bit for bit; what cannot be said is refused."""

import itertools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import jlora as jl
from jlora.cli import convert, files, inspect

ROOT = Path(__file__).parents[2] / "third_party"
LLAMA = ROOT / "peft" / "llama"
WEIGHTS = "adapter_model.safetensors"


def run(*words, status=0):
    assert convert.main([str(w) for w in words]) == status


def assert_same_deltas(a, b):
    """By NumPy, from the tensors and alpha of two PEFT directories of LoKr, LoHa or LoRA."""
    for key, expected in deltas(b).items():
        np.testing.assert_allclose(deltas(a)[key], expected, rtol=1e-5, atol=1e-7)


def deltas(path):
    config = json.loads((path / "adapter_config.json").read_text())
    t = {k: v.astype("f8") for k, v in load_file(path / WEIGHTS).items()}
    rank = config["r"]
    scale = config["alpha" if "alpha" in config else "lora_alpha"] / rank
    out = {}
    for module in sorted({k.rpartition(".lo" if ".lora_" in k else ".")[0] for k in t}):
        p = {k.removeprefix(f"{module}."): v for k, v in t.items() if k.startswith(f"{module}.")}
        if "lokr_w1" in p:
            out[module] = scale * np.kron(p["lokr_w1"], p["lokr_w2"])
        elif "hada_w1_a" in p:
            first, second = p["hada_w1_a"] @ p["hada_w1_b"], p["hada_w2_a"] @ p["hada_w2_b"]
            out[module] = scale * first * second
        elif "lora_A.weight" in p:
            out[module] = scale * p["lora_B.weight"] @ p["lora_A.weight"]
    assert out
    return out


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr"])
def test_through_every_format_that_can_say_it_and_back(tmp_path, name):
    """A chain through all formats ends with the tensors that PEFT wrote."""
    formats = ["kohya", "orbax"] + (["diffusers"] if name in ("lora", "dora") else [])
    for order in itertools.permutations(formats):
        at, kind = LLAMA / name, "peft"
        for to in (*order, "peft"):
            new = tmp_path / f"{name}-{'-'.join(order)}-{to}"
            new = new.with_suffix(".safetensors") if to in ("kohya", "diffusers") else new
            base = ("--base", LLAMA / "base") if kind in ("kohya", "peft", "diffusers") else ()
            run(at, new, "--to", to, *base, "--overwrite")
            at, kind = new, to
        got, expected = load_file(at / WEIGHTS), load_file(LLAMA / name / WEIGHTS)
        assert got.keys() == expected.keys()
        if name != "lokr":  # kohya has no alpha for it: the scale is folded into an array
            assert all(np.array_equal(got[k], expected[k]) for k in expected)
        assert_same_deltas(at, LLAMA / name)


def test_for_llama_cpp_and_back(tmp_path, capsys):
    """Bit for bit with the same rank and alpha; `inspect` reads the file without a base."""
    pytest.importorskip("gguf", reason="gguf is an extra")
    base, file = LLAMA / "base", tmp_path / "lora.gguf"
    run(LLAMA / "lora", file, "--to", "gguf", "--base", base)
    run(file, tmp_path / "back", "--to", "peft", "--base", base)
    got, expected = load_file(tmp_path / "back" / WEIGHTS), load_file(LLAMA / "lora" / WEIGHTS)
    chex.assert_trees_all_equal(got, expected)
    old, new = (json.loads((at / "adapter_config.json").read_text())
                for at in (LLAMA / "lora", tmp_path / "back"))  # fmt: skip
    assert (new["r"], new["lora_alpha"]) == (old["r"], old["lora_alpha"])
    capsys.readouterr()
    assert inspect.main([str(file)]) == 0
    assert "blk.0.attn_q" in capsys.readouterr().out
    run(LLAMA / "lora", tmp_path / "none.gguf", "--to", "gguf", status=2)
    assert "--base is needed" in capsys.readouterr().err


def test_the_lora_of_a_jax_package_and_back(tmp_path, capsys):
    """Tunix's own leaves, as an Orbax checkpoint, to PEFT and back: rank and alpha kept."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 2, 4), "w_lora_a": (8, 3), "w_lora_b": (3, 2, 4)}
    proj = {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()}
    tree = {"layers": {"0": {"attn": {"q_proj": proj}}}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tunix", tree)
    run(tmp_path / "tunix", tmp_path / "peft", "--to", "peft", "--names", "tunix", "--alpha", 6)
    got = load_file(tmp_path / "peft" / WEIGHTS)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(got[start + "A.weight"], proj["w_lora_a"].T)
    np.testing.assert_array_equal(got[start + "B.weight"], proj["w_lora_b"].reshape(3, 8).T)
    run(tmp_path / "peft", tmp_path / "back.safetensors", "--to", "leaves", "--names", "tunix",
        "--like", tmp_path / "tunix", "--package", "qwix")  # fmt: skip
    back = load_file(tmp_path / "back.safetensors")
    for name in ("w_lora_a", "w_lora_b"):
        np.testing.assert_array_equal(back[f"layers/0/attn/q_proj/{name}"], proj[name])
    run(tmp_path / "back.safetensors", tmp_path / "again", "--to", "peft", "--names", "tunix")
    chex.assert_trees_all_equal(load_file(tmp_path / "again" / WEIGHTS), got)
    capsys.readouterr()
    run(tmp_path / "tunix", tmp_path / "x", "--to", "peft", "--names", "tunix", status=2)
    assert "that of qwix's LoraRule" in capsys.readouterr().err


def test_flattened_leaves_of_maxtext_and_back(tmp_path, capsys):
    """Scanned layers at axis 1, heads flattened: read with the shapes of the weights."""
    rng = np.random.default_rng(0)
    folder = "decoder/layers/self_attention/query/kernel"
    base = {folder: np.zeros((6, 3, 2, 4), "f4")}  # [features, layers, heads, head size]
    a, b = (rng.normal(size=s).astype("f4") for s in ((6, 3, 2), (2, 3, 8)))
    save_file({f"{folder}_lora_a": a, f"{folder}_lora_b": b}, tmp_path / "lora.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    source, like = tmp_path / "lora.safetensors", ("--like", tmp_path / "base.safetensors")
    options = ("--names", "maxtext", "--alpha", 4)
    run(source, tmp_path / "x", "--to", "peft", *options, status=2)
    assert "are flattened" in capsys.readouterr().err
    run(source, tmp_path / "peft", "--to", "peft", *options, *like)
    got = load_file(tmp_path / "peft" / WEIGHTS)
    for layer in range(3):
        start = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        np.testing.assert_array_equal(got[start + "A.weight"], a[:, layer].T)
        np.testing.assert_array_equal(got[start + "B.weight"], b[:, layer].T)
    run(tmp_path / "peft", tmp_path / "back.safetensors", "--to", "leaves", "--names", "maxtext",
        "--package", "maxtext", *like)  # fmt: skip
    back = load_file(tmp_path / "back.safetensors")
    np.testing.assert_array_equal(back[f"{folder}_lora_a"], a)
    np.testing.assert_array_equal(back[f"{folder}_lora_b"], b)


def test_configuration_is_carried_over_and_can_be_given(tmp_path):
    run(LLAMA / "lora", tmp_path / "a", "--to", "peft")
    old = json.loads((LLAMA / "lora" / "adapter_config.json").read_text())
    new = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "base_model_name_or_path", "task_type"):
        assert new[field] == old[field], field
    run(LLAMA / "lora", tmp_path / "b", "--to", "peft", "--base_model_name", "me/mine",
        "--task_type", "SEQ_CLS")  # fmt: skip
    new = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (new["base_model_name_or_path"], new["task_type"]) == ("me/mine", "SEQ_CLS")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """An adapter of a JAX model with stacked layers, as an Orbax checkpoint."""
    params = {"layers": {"q": jnp.ones((3, 8, 6), jnp.float32)}}

    def model(p, x):
        return jax.lax.scan(lambda c, w: (jnp.pad(c @ w, ((0, 0), (0, 2))), None), x, *p.values())[
            0
        ]

    def apply(p, x):
        return model({"q": p["layers"]["q"]}, x)

    adapter = jl.init(jax.random.key(0), apply, params, jnp.ones((2, 8)),
                      methods={"layers/q": jl.LoRA(rank=2, alpha=3.0)})  # fmt: skip
    noise = jax.tree.map(
        lambda t: jnp.asarray(np.random.default_rng(0).normal(size=t.shape), t.dtype),
        adapter.trainable,
    )
    path = tmp_path_factory.mktemp("orbax") / "mine"
    jl.io.save_adapter(path, adapter.replace(trainable=noise))
    return path


def test_a_name_map_takes_a_jax_adapter_to_peft_and_back(tmp_path, mine):
    names = tmp_path / "names.yaml"
    names.write_text('"layers/(q)": "model.layers.{i}.self_attn.\\\\1_proj"\n')
    run(mine, tmp_path / "peft", "--to", "peft", "--names", names)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    adapter = jl.io.restore_adapter(mine)
    for layer in range(3):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
        expected = np.asarray(adapter.trainable["layers/q"]["a"][layer]).T
        assert np.array_equal(tensors[key], expected)
    run(tmp_path / "peft", tmp_path / "back", "--to", "orbax", "--names", names, "--like", mine)
    again = jl.io.restore_adapter(tmp_path / "back")
    chex.assert_trees_all_equal(again.trainable, adapter.trainable)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((LLAMA / "none", "--to", "orbax"), "no such file or directory"),
        ((ROOT / "lycoris" / "lora.safetensors", "--to", "peft"), "--base is needed"),
        ((LLAMA / "oft", "--to", "diffusers", "--base", LLAMA / "base"), "LoRA only, got OFT"),
        ((LLAMA / "lora", "--to", "orbax", "--names", "nobody"), "expected a file or one of"),
        ((LLAMA / "dora", "--to", "orbax", "--base", LLAMA / "lora"), "has neither"),
        ((LLAMA / "lora_saved", "--to", "kohya", "--base", LLAMA / "base"), "has no place for"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(tmp_path, capsys, words, said):
    source, *rest = words
    run(source, tmp_path / "new", *rest, status=2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "partial" not in error
    assert not list(tmp_path.iterdir())


def test_mutation_a_writer_that_loses_something_is_caught(tmp_path, monkeypatch, capsys):
    write = files.write

    def rounded(path, kind, adapter, *rest, **more):
        coarse = jax.tree.map(lambda t: jnp.round(t * 64) / 64, adapter.trainable)
        write(path, kind, adapter.replace(trainable=coarse), *rest, **more)

    monkeypatch.setattr(files, "write", rounded)
    run(LLAMA / "lora", tmp_path / "new", "--to", "orbax", status=2)
    assert "does not give it back" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_existing_target_is_kept_unless_told_otherwise(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    run(LLAMA / "lora", tmp_path / "new", "--to", "peft", status=2)
    assert "exists already" in capsys.readouterr().err

"""Layouts of weights by hand, and what of tables and convolutions is refused, with its reason."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jlora as jl
from jlora.cli.merge import layout, write
from jlora.cli.merge import main as command
from jlora.cli.merge.base import Base
from jlora.cli.merge.config import PLAIN
from jlora.io import FormatError, NameMap, safetensors_file

GOLDEN = Path(__file__).parents[3] / "third_party/peft/llama"
F32 = jnp.dtype("float32")
WEIGHTS = {"table.weight": (5, 3), "linear.weight": (4, 3), "conv.weight": (4, 3, 2, 5)}


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    """A base with a weight of each kind, and a LoRA of rank 2 written by hand."""
    (tmp_path / "base").mkdir()
    base = {name: normal(shape, k) for k, (name, shape) in enumerate(WEIGHTS.items())}
    safetensors_file.write(tmp_path / "base/model.safetensors", base, {"format": "pt"})
    factors = {
        "table.lora_embedding_A": normal((2, 5), 5), "table.lora_embedding_B": normal((3, 2), 6),
        "linear.lora_A.weight": normal((2, 3), 7), "linear.lora_B.weight": normal((4, 2), 8),
        "conv.lora_A.weight": normal((2, 3, 2, 5), 9),
        "conv.lora_B.weight": normal((4, 2, 1, 1), 10),
    }  # fmt: skip
    adapter(tmp_path / "lora", factors)
    return tmp_path


def adapter(folder, factors, **fields):
    """PEFT's two files; r = alpha = 2."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields}
    targets = {"target_modules": sorted({name.partition(".")[0] for name in factors})}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(targets | config))
    tensors = {f"base_model.model.{name}": t for name, t in factors.items()}
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def factors_of(folder):
    tensors, _ = safetensors_file.read(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): t for name, t in tensors.items()}


def run(files, models=("lora",), weight=1.0, base=True, form="merged", **changes):
    """(status, target) of the sum of models."""
    config = {
        "merge_method": "concat",
        "models": [{"model": str(m), "parameters": {"weight": weight}} for m in models],
        "out": {"path": "out", "format": form},
        **({"base_model": "base"} if base else {}),
        **changes,
    }
    (files / "merge.yaml").write_text(yaml.safe_dump(config))
    status = command.main(["--config", str(files / "merge.yaml"), "--overwrite"])
    return status, files / "out"


def deltas(folder):
    """By numpy, as torch has the weights."""
    f = factors_of(folder)
    return {
        "table.weight": np.einsum("ri,or->io", f["table.lora_embedding_A"],
                                  f["table.lora_embedding_B"]),
        "linear.weight": np.einsum("ri,or->oi", f["linear.lora_A.weight"],
                                   f["linear.lora_B.weight"]),
        "conv.weight": np.einsum("rchw,orxy->ochw", f["conv.lora_A.weight"],
                                 f["conv.lora_B.weight"]),
    }  # fmt: skip


def check_merged(files, out, times=1.0):
    old, new = Base(files / "base"), Base(out)
    for name, d in deltas(files / "lora").items():
        np.testing.assert_allclose(new.tensor(name) - old.tensor(name), times * d, atol=1e-5)


def test_merged_weights_are_the_base_and_the_products_of_the_factors(files):
    status, out = run(files)
    assert status == 0
    check_merged(files, out)
    status, out = run(files, ("lora", "lora"))
    check_merged(files, out, times=2.0)
    with pytest.raises(AssertionError):
        check_merged(files, out, times=1.9)


def test_weights_and_matrices_there_and_back():
    """A table is its matrix, a linear layer the transpose, a convolution [window * in, out]."""
    for name, shape in WEIGHTS.items():
        site = layout.site_of("m", shape, F32, table=name.startswith("table"))
        w = normal(shape)
        m = layout.from_torch(site, w)
        assert layout.torch_shape(site) == shape and m.shape == (site.d_in, site.d_out)
        np.testing.assert_array_equal(layout.to_torch(site, m), w)
        order = {"table": (0, 1), "linear": (1, 0), "conv": (2, 3, 1, 0)}[name.partition(".")[0]]
        np.testing.assert_array_equal(m, w.transpose(order).reshape(m.shape))


def test_a_kernel_of_groups_is_a_kernel_of_the_channels_of_one(files):
    """A JAX adapter of a grouped convolution [2, 5, 3, 4] merges as any; the window comes first."""
    site = jl.Site("conv/kernel", (2, 5, 3, 4), "iiio", F32, ("conv",))
    a, b = normal((30, 2), 1), normal((2, 4), 2)
    made = jl.LoRA(rank=2)
    frozen = {"scale": jnp.asarray(1.0)}
    arrays = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    one = jl.Adapter({site.path: arrays}, {site.path: frozen}, ((site, made),))
    jl.io.save_adapter(files / "orbax", one)
    status, out = run(files, ("orbax",))
    assert status == 0
    got = Base(out).tensor("conv.weight") - Base(files / "base").tensor("conv.weight")
    np.testing.assert_allclose(got, (a @ b).reshape(2, 5, 3, 4).transpose(3, 2, 0, 1), atol=1e-5)


def test_rows_that_are_trained_become_rows_of_the_merged_table(tmp_path):
    """PEFT's `trainable_token_indices` alongside LoRA: 0.5 of the way to each new row."""
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    folder = GOLDEN / "lora_tokens"
    status, out = run(tmp_path, (folder,), weight=0.5)
    assert status == 0
    ids = json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
    rows = factors_of(folder)["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    old, new = (Base(f).tensor("model.embed_tokens.weight") for f in (tmp_path / "base", out))
    want = old.copy()
    want[ids["embed_tokens"]] += 0.5 * (rows - old[ids["embed_tokens"]])
    np.testing.assert_allclose(new, want, atol=1e-5)
    assert np.abs(want - old).max() > 0.1


def refused(files, capsys, *texts, **changes):
    status, out = run(files, **changes)
    said = capsys.readouterr().err
    assert status == 2 and not out.exists()
    for text in texts:
        assert text in said, said


@pytest.mark.parametrize("base", [True, False])
def test_peft_factors_of_a_grouped_convolution_are_refused(base, files, capsys):
    """The first reads all 6 channels of two groups, the second 1 of 2 ranks."""
    factors = {"conv.lora_A.weight": normal((2, 6, 2, 5)),
               "conv.lora_B.weight": normal((4, 1, 1, 1))}  # fmt: skip
    adapter(files / "grouped", factors)
    refused(files, capsys, "conv: got lora_B.weight (4, 1, 1, 1), expected (4, 2, 1, 1)", "grouped",
            models=("grouped",), base=base, form="merged" if base else "peft")  # fmt: skip


def test_a_table_that_is_the_output_layer_as_well_is_not_merged(files, capsys):
    config = {"tie_word_embeddings": True, "vocab_size": 5}
    nested = {"tie_word_embeddings": True, "text_config": {"vocab_size": 5}}
    for told in (nested, config):
        (files / "base/config.json").write_text(json.dumps(told))
        refused(files, capsys, "table/embedding", "got tie_word_embeddings true", "expected false")
    assert run(files, form="peft")[0] == 0
    (files / "base/config.json").write_text(json.dumps(config | {"vocab_size": 4}))
    assert run(files)[0] == 0


def test_weights_kept_the_other_way_round_are_refused_with_a_base(files, capsys):
    """Else a square one would be merged transposed."""
    adapter(files / "lora", factors_of(files / "lora"), fan_in_fan_out=True)
    refused(files, capsys, "got fan_in_fan_out true", "expected false")
    assert run(files, base=False, form="peft")[0] == 0


def test_two_adapters_that_take_a_module_for_different_things(files, capsys):
    adapter(files / "other", {"table.lora_A.weight": normal((2, 3)),
                              "table.lora_B.weight": normal((5, 2))})  # fmt: skip
    both = ("lora", "other")
    refused(files, capsys, "table/kernel: got dot (3, 5), expected gather (5, 3)", models=both,
            base=False, form="peft", missing="zero")  # fmt: skip
    refused(files, capsys, "table", "lora_A.weight", "expected ['lora_embedding_A'", models=both,
            missing="zero")  # fmt: skip


def test_sites_without_a_name_or_a_weight_of_their_shape_are_refused(files):
    base = Base(files / "base")
    site = jl.Site("conv/kernel", (2, 5, 3, 3), "iiio", F32, ("conv",))
    with pytest.raises(FormatError, match=r"conv.weight: got \(4, 3, 2, 5\), expected \(3, 3, 2"):
        write.changed(base, [site], PLAIN)
    with pytest.raises(ValueError, match="no rule for site 'conv/kernel'"):
        write.changed(base, [site], NameMap({"linear/kernel": "linear"}))
    with pytest.raises(FormatError, match="conv/kernel: got a bare parameter, expected a weight"):
        write.changed(base, [site], NameMap({"conv/kernel": "conv[weight]"}))
    with pytest.raises(FormatError, match=r"has no other\.weight"):
        write.changed(base, [site], NameMap({"conv/kernel": "other"}))


def test_trained_rows_need_the_base(tmp_path, capsys):
    refused(tmp_path, capsys, "base_model", "model.embed_tokens: rows that are trained need",
            models=(GOLDEN / "lora_tokens",), base=False, form="peft")  # fmt: skip


def test_a_mutated_layout_is_seen(files, monkeypatch):
    """Window and channels swapped where merged weights are written."""
    good = layout.to_torch

    def bad(site, m):
        t = good(site, m)
        return t if t.ndim == 2 else t.swapaxes(1, 2).reshape(t.shape)

    monkeypatch.setattr(layout, "to_torch", bad)
    with pytest.raises(AssertionError):
        check_merged(files, run(files)[1])


def test_plans_name_tables_and_convolutions(files, capsys):
    assert run(files, form="peft")[0] == 0
    path = files / "merge.yaml"
    assert command.main(["--config", str(path), "--dry_run", "--overwrite"]) == 0
    text = capsys.readouterr().out
    for words in ("[5, 3], rank 2", "[30, 4], rank 2", "table/embedding", "conv/kernel"):
        assert words in text, text


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_plans_memory_of_a_large_table_is_what_writing_takes(dtype, tmp_path, monkeypatch):
    """A table of 2 MB in float16 and a matrix: what Python allocates, and what safetensors may."""
    (tmp_path / "base").mkdir()
    base = {"table.weight": (5000, 200), "linear.weight": (1000, 200)}
    base = {name: np.ones(shape, np.float16) for name, shape in base.items()}
    safetensors_file.write(tmp_path / "base/model.safetensors", base, {"format": "pt"})
    factors = {
        "table.lora_embedding_A": normal((2, 5000)),
        "table.lora_embedding_B": normal((200, 2)),
    }
    adapter(tmp_path / "lora", factors)
    real, peaks = write.merged, []

    def traced(*args):
        tracemalloc.start()
        real(*args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    monkeypatch.setattr(write, "merged", traced)
    out = {"path": "out", "format": "merged", "dtype": dtype}
    assert run(tmp_path, out=out)[0] == 0
    told = Base(tmp_path / "base").writing({"table.weight"}, dtype)
    assert 0.65 * told <= peaks[0] <= 1.05 * told
    assert told > 3 * (tmp_path / "base/model.safetensors").stat().st_size

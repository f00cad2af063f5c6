"""Adapters that PEFT wrote: its outputs, bitwise back; and what is refused. No torch needed."""

import dataclasses
import hashlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, safetensors_file
from jlora.io.peft.table import Read, Slice
from jlora.methods.decomposed import dora
from jlora.methods.kronecker import lokr
from jlora.methods.low_rank import adalora, hira, loha
from jlora.methods.orthogonal import boft, oft
from jlora.methods.selective import ia3
from jlora.methods.shared_basis import vera
from tests.io.shared import error

METHODS = {
    "adalora": adalora.AdaLoRA,
    "boft": boft.BOFT,
    "dora": dora.DoRA,
    "dora_rslora": dora.DoRA,
    "hira": hira.HiRA,
    "ia3": ia3.IA3,
    "loha": loha.LoHa,
    "lokr": lokr.LoKr,
    "lokr_factored": lokr.LoKr,
    "oft": oft.OFT,
    "vera": vera.VeRA,
}
BOTH = ["lora", "lora_all", "lora_layers", "lora_rslora", *METHODS]
BOTH.remove("dora_rslora")
BERT = ["lora_patterns", "lora_exclude", "lora_linear", "lora_gaussian", "lora_embedding"]
BERT.append("dora_rslora")
CASES = [("bert", n) for n in [*BOTH, *BERT] if n != "ia3"] + [("llama", n) for n in BOTH]
TOLERANCE = 1e-5


def weights(path):
    return (path / "adapter_model.safetensors").read_bytes()


def config(path):
    return json.loads((path / "adapter_config.json").read_text())


def test_golden_files_are_those_of_the_metadata(golden):
    folder = golden["bert"].path.parent
    lines = (folder / "METADATA").read_text().split("sha256:\n")[1].splitlines()
    listed = dict(reversed(line.split()) for line in lines)
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files - {"METADATA"} == set(listed)
    assert max((folder / name).stat().st_size for name in listed) < 100_000


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_peft_files_compute_what_peft_computes_and_go_back_bitwise(golden, tmp_path, kind, name):
    model = golden[kind]
    adapter = jl.io.load_peft(model.path / name, model.names, model.params, layout="in_out")
    assert {type(m) for _, m in adapter.sites} == {METHODS.get(name, jl.LoRA)}
    want = safetensors_file.read(model.path / name / "expected.safetensors")[0]["expected"]
    assert error(model.expected, want) > 1e-3  # the adapter does something
    merged = jl.merge(model.params, adapter)
    assert error(jax.jit(model.fn)(merged, *model.args), want) <= TOLERANCE
    if kind == "llama" or name.startswith("lora_"):  # lift compiles anew for every method
        assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) <= TOLERANCE

    jl.io.save_peft(tmp_path, adapter, model.names, params=model.params)
    assert weights(tmp_path) == weights(model.path / name)
    again = jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    chex.assert_trees_all_equal(adapter, again)
    ours, theirs = config(tmp_path), config(model.path / name)
    assert set(ours) >= set(theirs) - {"auto_mapping"}
    if name != "lora_patterns":  # there the same patterns are written by module
        told = {"auto_mapping", "exclude_modules", "layers_to_transform", "target_modules"}
        told |= {"feedforward_modules", "lora_dropout", "init_lora_weights"}
        told |= {"target_r", "total_step"}  # of AdaLoRA's schedule
        same = set(theirs) - told
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


def test_the_sites_of_a_trace_do_as_well_as_parameters(golden):
    model = golden["bert"]
    sites = jl.sites(model.fn, model.params, *model.args)
    for name in ("lora_linear", "lora_embedding"):
        a = jl.io.load_peft(model.path / name, model.names, sites)
        b = jl.io.load_peft(model.path / name, model.names, model.params, layout="in_out")
        assert jax.tree.structure(a) == jax.tree.structure(b)
    with pytest.raises(FormatError, match="kernel: PEFT's IA3 scales its bias too"):
        jl.io.load_peft(model.path / "ia3", model.names, sites)
    with pytest.raises(FormatError, match="scales biases; pass params"):  # a part of them, perhaps
        jl.io.load_peft(model.path / "ia3", model.names, list(sites))


def test_patterns_layers_and_scales_by_module(golden):
    model = golden["bert"]
    adapter = jl.io.load_peft(
        model.path / "lora_patterns", model.names, model.params, layout="in_out"
    )
    path = "layers/attention/query/kernel"
    site, method = adapter.sites[0]
    assert site.path == path and method.rank == 5
    assert adapter.trainable[path]["a"].shape == (3, 16, 5)
    np.testing.assert_array_equal(
        adapter.frozen[path]["scale"], np.asarray([7 / 3, 7 / 5, 7 / 3], np.float32)
    )
    assert not np.any(np.asarray(adapter.trainable[path]["a"])[[0, 2], :, 3:])  # padding
    layers = jl.io.load_peft(model.path / "lora_layers", model.names, model.params, layout="in_out")
    used = [bool(np.any(np.asarray(layers.trainable[path]["b"])[i])) for i in range(3)]
    assert used == [True, False, True]


def test_adapters_of_upper_layers_only(golden, tmp_path):
    model = golden["bert"]
    upper = {"layers": jax.tree.map(lambda t: t[1:], model.params["layers"])}
    with pytest.raises(FormatError, match=r"'encoder.layer.0.attention.self.\w+' is not a site"):
        jl.io.load_peft(
            model.path / "lora", model.names.replace(layer_offset=1), upper, layout="in_out"
        )
    whole = jl.io.load_peft(model.path / "lora", model.names, model.params, layout="in_out")
    cut = jax.tree.map(lambda t: t[1:], whole)
    names = model.names.replace(layer_offset=1, prefix="bert.")
    cut = cut.replace(
        sites=tuple((jl.Site(s.path, (2, *s.shape[1:]), s.kinds, s.dtype), m) for s, m in cut.sites)
    )
    jl.io.save_peft(tmp_path, cut, names, base_model_name="tiny", task_type="SEQ_CLS")
    written = config(tmp_path)
    assert written["base_model_name_or_path"] == "tiny" and written["task_type"] == "SEQ_CLS"
    assert written["target_modules"][0] == "bert.encoder.layer.1.attention.self.query"
    back = jl.io.load_peft(tmp_path, names, upper, layout="in_out")
    chex.assert_trees_all_equal(cut, back)


def test_a_fresh_adapter_and_a_frozen_a_are_written(golden, tmp_path):
    model = golden["llama"]
    methods = {"attention/(query|value)": jl.LoRA(rank=2, alpha=3, freeze_a=True, rslora=True)}
    made = jl.init(jax.random.key(0), model.fn, model.params, *model.args, methods=methods)
    jl.io.save_peft(tmp_path / "new" / "folder", made, model.names)
    back = jl.io.load_peft(tmp_path / "new" / "folder", model.names, model.params, layout="in_out")
    path = "layers/attention/value/kernel"
    np.testing.assert_array_equal(back.trainable[path]["a"], made.frozen[path]["a"])
    np.testing.assert_array_equal(back.frozen[path]["scale"], made.frozen[path]["scale"])
    assert config(tmp_path / "new" / "folder")["lora_alpha"] == 3


def test_low_precision_keeps_its_dtype_and_double_needs_x64(golden, tmp_path):
    model = golden["bert"]
    adapter = jl.io.load_peft(model.path / "lora", model.names, model.params, layout="in_out")
    half = adapter.replace(
        trainable=jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter.trainable)
    )
    jl.io.save_peft(tmp_path, half, model.names)
    back = jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")
    chex.assert_trees_all_equal_shapes_and_dtypes(half, back)
    chex.assert_trees_all_equal(half, back)
    tensors, meta = safetensors_file.read(tmp_path / "adapter_model.safetensors")
    double = {k: v.astype(np.float64) for k, v in tensors.items()}
    safetensors_file.write(tmp_path / "adapter_model.safetensors", double, meta)
    with pytest.raises(FormatError, match="jax_enable_x64"):
        jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")


def test_weights_of_the_base_model_are_never_dropped(golden, tmp_path):
    model, name = golden["bert"], "lora_bias"
    with pytest.raises(FormatError, match="replaces weights of the base model"):
        jl.io.load_peft(model.path / name, model.names, model.params, layout="in_out")
    adapter = jl.io.load_peft(
        model.path / name, model.names, model.params, extras="leave", layout="in_out"
    )
    extras = jl.io.peft_extras(model.path / name)
    assert set(extras) == {f"encoder.layer.{i}.attention.self.query.bias" for i in range(3)}
    biases = jnp.asarray(np.stack([extras[k] for k in sorted(extras)]))
    params = jax.tree.map(lambda t: t, model.params)
    params["layers"]["attention"]["query"]["bias"] = biases
    want = safetensors_file.read(model.path / name / "expected.safetensors")[0]["expected"]
    assert error(jl.lift(model.fn)(params, adapter, *model.args), want) <= TOLERANCE
    jl.io.save_peft(tmp_path, adapter, model.names, extras=extras)
    assert weights(tmp_path) == weights(model.path / name)
    assert config(tmp_path)["bias"] == "lora_only"

    head = {"classifier.weight": np.ones((2, 16), np.float32), "classifier.bias": np.zeros(2, "f4")}
    jl.io.save_peft(tmp_path, adapter, model.names, extras=head)
    assert config(tmp_path)["modules_to_save"] == ["classifier"]
    assert {k: v.tobytes() for k, v in jl.io.peft_extras(tmp_path).items()} == {
        k: v.tobytes() for k, v in head.items()
    }
    with pytest.raises(FormatError, match="replaces a weight that the adapter changes"):
        query = {"encoder.layer.0.attention.self.query.weight": np.ones((16, 16), np.float32)}
        jl.io.save_peft(tmp_path, adapter, model.names, extras=query)


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("bert", "prompt", "'PROMPT_TUNING' cannot be read .it adds tokens"),
        ("bert", "ia3", "IA3 scales its bias too"),
    ],
)
def test_what_jlora_cannot_represent_is_refused(golden, kind, name, why):
    model = golden[kind]
    with pytest.raises(FormatError, match=why):
        jl.io.load_peft(model.path / name, model.names, model.params, layout="in_out")


def test_a_start_that_peft_makes_from_the_base_is_read_with_it(golden):
    model = golden["bert"]
    folder = model.path / "lora_pissa"
    adapter = jl.io.load_peft(folder, model.names, model.params, layout="in_out")
    assert {type(method) for _, method in adapter.sites} == {jl.Residual}
    want = safetensors_file.read(folder / "expected.safetensors")[0]["expected"]
    assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) <= TOLERANCE


def edited(model, tmp_path, name="lora", **change):
    """A copy of a golden adapter with other config fields."""
    shutil.copytree(model.path / name, tmp_path / "edited")
    (tmp_path / "edited" / "adapter_config.json").write_text(
        json.dumps({**config(model.path / name), **change})
    )
    return tmp_path / "edited"


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("lora", {"target_modules": ["query"]}, "which the config does not target"),
        ("lora", {"target_modules": ["query", "key", "value"]}, "lacks tensors of the targets"),
        ("lora", {"r": 4}, r"has shape \[3, 16\], expected \[4, 16\]"),
        ("lora", {"r": 0}, "rank"),
        ("lora", {"rank_pattern": {"value": 2}}, "expected"),
        ("lora", {"use_dora": True}, "expected one of"),
        ("dora", {"use_dora": False}, "surplus|expected one of"),
        ("lora", {"modules_to_save": ["attention"]}, "does not target"),
        ("lora", {"peft_type": "LOHA"}, "cannot be represented|surplus"),
        ("lora", {"peft_type": None}, "peft_type"),
        ("vera", {"r": 5}, "expected"),
        ("oft", {"coft": True}, "coft"),
        ("oft", {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms"),
        ("oft", {"block_share": True}, "oft_R.weight"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor"),
        ("lokr", {"decompose_factor": 2}, "PEFT makes"),
        ("loha", {"r": -1}, "expected"),
        ("adalora", {"init_r": 2}, "expected"),
        ("adalora", {"rank_pattern": {"x": [True, False]}}, "rank_pattern"),
        ("boft", {"boft_block_size": 8}, "expected"),
        ("boft", {"boft_block_size": 0, "boft_block_num": 5}, "divides 16"),
        ("boft", {"boft_block_num": 4}, "the other 0"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(golden, tmp_path, name, change, why):
    model = golden["bert"]
    with pytest.raises(FormatError, match=why):
        jl.io.load_peft(
            edited(model, tmp_path, name, **change), model.names, model.params, layout="in_out"
        )


def test_exact_oft_is_pefts_transpose(golden, tmp_path):
    model = golden["bert"]
    path = edited(model, tmp_path, "oft", use_cayley_neumann=False)
    adapter = jl.io.load_peft(path, model.names, model.params, layout="in_out")
    where = "layers/attention/query/kernel"
    _, method = adapter.sites[0]
    q = safetensors_file.read(path / "adapter_model.safetensors")[0][
        "base_model.model.encoder.layer.0.attention.self.query.oft_R.weight"
    ]
    skew = np.zeros((4, 4))
    skew[np.triu_indices(4, 1)] = q[0]
    skew -= skew.T
    want = (np.eye(4) - skew) @ np.linalg.inv(np.eye(4) + skew)  # PEFT's (I - Q)(I + Q)^-1
    got = method.rotations({"q": adapter.trainable[where]["q"][0]})[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    jl.io.save_peft(tmp_path / "back", adapter, model.names)
    assert weights(tmp_path / "back") == weights(path)


def without_bases(model, tmp_path, **change):
    path = edited(model, tmp_path, "vera", **change)
    tensors, meta = safetensors_file.read(path / "adapter_model.safetensors")
    kept = {key: array for key, array in tensors.items() if "lambda" in key}
    safetensors_file.write(path / "adapter_model.safetensors", kept, meta)
    return path


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_vera_bases_grow_again_from_torchs_seed_bitwise(golden, tmp_path, kind):
    model = golden[kind]
    path = without_bases(model, tmp_path, save_projection=False)
    grown = jl.io.load_peft(path, model.names, model.params, layout="in_out")
    read = jl.io.load_peft(model.path / "vera", model.names, model.params, layout="in_out")
    chex.assert_trees_all_equal(grown, read)


def test_vera_without_bases_that_should_be_there_is_refused(golden, tmp_path):
    model = golden["bert"]
    with pytest.raises(FormatError, match=r"got shared tensors \[\], expected"):
        path = without_bases(model, tmp_path, save_projection=True)
        jl.io.load_peft(path, model.names, model.params, layout="in_out")


def test_files_that_are_not_there_or_not_what_they_say(golden, tmp_path):
    model = golden["bert"]
    with pytest.raises(FormatError, match="cannot be read"):
        jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")
    path = edited(model, tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model.bin.*never opened"):
        jl.io.load_peft(path, model.names, model.params, layout="in_out")
    with pytest.raises(ValueError, match="extras"):
        jl.io.load_peft(path, model.names, model.params, extras="drop", layout="in_out")


def test_what_peft_cannot_say_is_not_written(golden, tmp_path):
    model = golden["llama"]

    def made(**methods):
        methods = {f"attention/{k}/": m for k, m in methods.items()}
        return jl.init(jax.random.key(0), model.fn, model.params, *model.args, methods=methods)

    def remade(adapter, method):
        return adapter.replace(sites=tuple((site, method) for site, _ in adapter.sites))

    for adapter, why in (
        (made(query=jl.LoRA(2), value=dora.DoRA(2)), "one method"),
        (made(query=jl.LoRA(2), value=jl.LoRA(2, rslora=True)), "one use_rslora"),
        (made(query=jl.LoRA(2), value=jl.LoRA(2, dropout=0.5)), "one lora_dropout"),
        (made(query=ia3.IA3()), "pass params"),
        (remade(made(query=lokr.LoKr(2)), lokr.LoKr(2, factor=2)), "PEFT makes"),
        (jax.tree.map(jnp.zeros_like, made(query=jl.LoRA(2))), "nothing to write"),
        (
            made(query=jl.LoRA(2)).replace(
                frozen={"layers/attention/query/kernel": {"scale": jnp.full(3, jnp.nan)}}
            ),
            "no alpha",
        ),
    ):
        with pytest.raises(FormatError, match=why):
            jl.io.save_peft(tmp_path / "x", adapter, model.names)
    with pytest.raises(ValueError, match="expected"):
        bank = jl.stack([made(query=jl.LoRA(2))] * 2)
        jl.io.save_peft(tmp_path / "x", bank, model.names)
    with pytest.raises(ValueError, match="no rule"):
        jl.io.save_peft(tmp_path / "x", made(query=jl.LoRA(2)), jl.io.NameMap({"a": "b"}))
    assert not (tmp_path / "x").exists()


@dataclasses.dataclass(frozen=True)
class Shift(jl.Method):
    """A user's method: one number a site, added to every weight."""

    def merge(self, w, p):
        return w + p["c"]

    @property
    def peft(self):
        return SHIFT


SHIFT = jl.io.Table(
    type="SHIFT",
    method=Shift,
    layouts=(("shift_c",),),
    fields={},
    write=lambda method, site, p: Slice({"shift_c": p["c"].reshape(1)}, {}),
    read=lambda site, t, fields: Read(Shift(), {"c": t["shift_c"].reshape(())}, {}),
)


def test_a_users_method_brings_its_own_table(golden, tmp_path):
    model = golden["llama"]
    site = jl.Site("layers/ffn/up/kernel", (3, 16, 24), "sio", jnp.dtype("float32"))
    made = jl.Adapter({site.path: {"c": jnp.arange(3.0)}}, {site.path: {}}, ((site, Shift()),))
    jl.io.save_peft(tmp_path, made, model.names)
    with pytest.raises(FormatError, match="'SHIFT' cannot be read"):
        jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")
    back = jl.io.load_peft(tmp_path, model.names, model.params, tables=[SHIFT], layout="in_out")
    assert back.sites == made.sites
    np.testing.assert_array_equal(back.trainable[site.path]["c"], made.trainable[site.path]["c"])


def test_a_bank_of_other_ranks_is_written_with_its_own(golden, tmp_path):
    model = golden["llama"]

    def made(rank, alpha):
        methods = {"attention/query/": jl.LoRA(rank, alpha)}
        return jl.init(jax.random.key(rank), model.fn, model.params, *model.args, methods=methods)

    small = made(2, 3.0)
    bank = jl.stack([small, made(5, 4.0)])
    jl.io.save_peft(tmp_path, bank[0], model.names)
    back = jl.io.load_peft(tmp_path, model.names, model.params, layout="in_out")
    assert back.sites[0][1].rank == 2 and back.sites[0][1].alpha == 3
    chex.assert_trees_all_equal(small, back)


def test_a_transposed_layout_is_seen(golden, monkeypatch):
    """The mutation check: parity fails when A and B are read without the transpose."""
    from jlora.io.peft import lora as peft_lora

    model = golden["bert"]
    right = peft_lora._factors

    def swapped(keys, site, t, rank):
        made = right(keys, site, t, rank)
        return {"a": made["b"].T, "b": made["a"].T}

    monkeypatch.setattr(peft_lora, "_factors", swapped)
    adapter = jl.io.load_peft(model.path / "lora", model.names, model.params, layout="in_out")
    want = safetensors_file.read(model.path / "lora" / "expected.safetensors")[0]["expected"]
    assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) > 100 * TOLERANCE

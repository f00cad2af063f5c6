"""Trained biases and norms in PEFT's files: the real PEFT's values, both ways, bitwise."""

import json

import chex
import jax
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file
from tests.io.shared import error, torch_output, trained

NORMS = "norm/(scale|bias)"
BIASES = "(query|up)/bias"


def weights(path):
    return (path / "adapter_model.safetensors").read_bytes()


def config(path):
    return json.loads((path / "adapter_config.json").read_text())


def load(path, model, **options):
    return jl.io.load_peft(path, model.names, model.params, layout="in_out", **options)


def bert(model):
    """The golden BERT in transformers, without the pooler that it does not have."""
    cls = pytest.importorskip("transformers").BertModel
    return cls.from_pretrained(model.path / "base", add_pooling_layer=False).eval()


def moved(module, seed=0):
    """Noise on what PEFT trains."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT of LayerNorm
def test_ln_tuning_of_the_real_peft(golden, tmp_path):
    """Its file: its outputs, and the same bits back, which it reads again."""
    peft, model = pytest.importorskip("peft"), golden["bert"]
    options = peft.LNTuningConfig(target_modules=["LayerNorm"])
    module = peft.get_peft_model(bert(model), options)
    moved(module)
    module.save_pretrained(tmp_path / "theirs")
    adapter = load(tmp_path / "theirs", model)
    assert {type(m) for _, m in adapter.sites} == {jl.LNTuning} and len(adapter.sites) == 6
    want = torch_output(module, model)
    assert error(model.expected, want) > 1e-3
    assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) <= 1e-5
    jl.io.save_peft(tmp_path / "ours", adapter, model.names)
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(bert(model), tmp_path / "ours")
    np.testing.assert_array_equal(torch_output(again, model), want)
    assert set(config(tmp_path / "ours")) == set(config(tmp_path / "theirs"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_next_to_lora_of_the_real_peft(golden, tmp_path, bias):
    peft, model = pytest.importorskip("peft"), golden["bert"]
    targets, saved = ["query", "output.dense"], ["LayerNorm"] if bias == "lora_only" else None
    options = peft.LoraConfig(r=2, target_modules=targets, bias=bias, modules_to_save=saved)
    module = peft.get_peft_model(bert(model), options)
    moved(module)
    module.save_pretrained(tmp_path / "theirs")
    with pytest.raises(FormatError, match="extras='adapt' for biases and norms"):
        load(tmp_path / "theirs", model)
    adapter = load(tmp_path / "theirs", model, extras="adapt")
    kinds = {type(m) for _, m in adapter.sites}
    assert kinds == {jl.LoRA, jl.BitFit} | ({jl.LNTuning} if saved else set())
    want = torch_output(module, model)
    assert error(model.expected, want) > 1e-3
    assert error(jl.lift(model.fn)(model.params, adapter, *model.args), want) <= 1e-5
    assert error(model.fn(jl.merge(model.params, adapter), *model.args), want) <= 1e-5
    jl.io.save_peft(tmp_path / "ours", adapter, model.names)
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    assert config(tmp_path / "ours")["bias"] == bias
    again = peft.PeftModel.from_pretrained(bert(model), tmp_path / "ours")
    np.testing.assert_array_equal(torch_output(again, model), want)


@pytest.mark.parametrize("name", ["lora_bias", "lora_bias_all"])
def test_golden_biases_are_sites_of_the_adapter(golden, tmp_path, name):
    """Golden files, without torch."""
    model = golden["bert"]
    adapter = load(model.path / name, model, extras="adapt")
    assert {type(m) for _, m in adapter.sites} == {jl.LoRA, jl.BitFit}
    want = safetensors_file.read(model.path / name / "expected.safetensors")[0]["expected"]
    merged = jl.merge(model.params, adapter)
    assert error(jax.jit(model.fn)(merged, *model.args), want) <= 1e-5
    jl.io.save_peft(tmp_path, adapter, model.names)
    assert weights(tmp_path) == weights(model.path / name)
    same = jax.tree.map(np.array_equal, adapter, load(tmp_path, model, extras="adapt"))
    assert all(jax.tree.leaves(same))


def test_both_methods_train_here_and_go_both_ways(golden, tmp_path):
    model = golden["bert"]
    lora = {"query/kernel": jl.LoRA(2), BIASES: jl.BitFit(), NORMS: jl.LNTuning()}
    for methods in ({NORMS: jl.LNTuning()}, {"norm/scale": jl.LNTuning()}, lora):
        adapter = trained(model.fn, model.params, model.args, methods)
        path = tmp_path / str(len(adapter.sites))
        jl.io.save_peft(path, adapter, model.names)
        back = load(path, model, extras="adapt")
        assert [(s.path, type(m)) for s, m in back.sites] == [
            (s.path, type(m)) for s, m in adapter.sites
        ]
        chex.assert_trees_all_equal(adapter, back)


def test_what_the_files_cannot_say(golden, tmp_path):
    model = golden["bert"]

    def made(**methods):
        methods = {k.replace("_", "/"): m for k, m in methods.items()}
        return trained(model.fn, model.params, model.args, methods)

    for adapter, why in (
        (made(query_bias=jl.BitFit()), r"no adapter of biases alone \(BitFit\)"),
        (made(query_kernel=jl.LoRA(2), norm_scale=jl.BitFit()), "BitFit is of biases"),
        (made(query_kernel=jl.LoRA(2), norm_bias=jl.LNTuning()), "expected BitFit"),
        (
            made(query_kernel=jl.LoRA(2), norm_scale=jl.LNTuning(), norm_bias=jl.BitFit()),
            "expected LNTuning",
        ),
    ):
        with pytest.raises(FormatError, match=why):
            jl.io.save_peft(tmp_path / "x", adapter, model.names)
    norms = made(embeddings_norm_scale=jl.LNTuning())
    with pytest.raises(ValueError, match="no rule for site"):
        jl.io.save_peft(tmp_path / "x", norms, NameMap({"a": "b"}))
    with pytest.raises(ValueError, match=r"is a vector.*expected such as 'module\[weight\]'"):
        jl.io.save_peft(tmp_path / "x", norms, NameMap({r"embeddings/norm/scale": "norm"}))
    both = made(query_kernel=jl.LoRA(2), query_bias=jl.BitFit())
    extras = {"encoder.layer.0.attention.self.query.bias": np.ones(16, np.float32)}
    with pytest.raises(FormatError, match="vectors of the adapter and extras as well"):
        jl.io.save_peft(tmp_path / "x", both, model.names, extras=extras)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, k: t.update({k + "x.ln_tuning_layers.weight": t[k + "weight"]}), "not a site"),
        (lambda t, k: t.update({k + "weight": np.ones(3, np.float32)}), r"shape \[3\], expected"),
        (lambda t, k: t.update({k + "gain": np.ones(3, np.float32)}), "surplus tensor"),
        (lambda t, k: [t.pop(k + leaf) for leaf in ("weight", "bias")], "lacks tensors of the tar"),
    ],
)
def test_a_damaged_ln_tuning_is_refused(golden, tmp_path, change, why):
    model = golden["bert"]
    adapter = trained(model.fn, model.params, model.args, {NORMS: jl.LNTuning()})
    jl.io.save_peft(tmp_path, adapter, model.names)
    tensors, header = safetensors_file.read(tmp_path / "adapter_model.safetensors")
    change(tensors, "base_model.model.encoder.layer.1.output.LayerNorm.ln_tuning_layers.")
    safetensors_file.write(tmp_path / "adapter_model.safetensors", tensors, header)
    with pytest.raises(FormatError, match=why):
        load(tmp_path, model)


def test_some_layers_of_a_stack_are_no_replacement_of_all(golden, tmp_path):
    """A vector is replaced whole, so that zeros for the layers left out would be wrong."""
    model = golden["bert"]
    adapter = trained(model.fn, model.params, model.args, {NORMS: jl.LNTuning()})
    jl.io.save_peft(tmp_path, adapter, model.names)
    tensors, header = safetensors_file.read(tmp_path / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if "layer.1" not in k}
    safetensors_file.write(tmp_path / "adapter_model.safetensors", kept, header)
    told = config(tmp_path)
    told["target_modules"] = [m for m in told["target_modules"] if "layer.1" not in m]
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(FormatError, match="LNTuning cannot be on a stacked site; unroll"):
        load(tmp_path, model)


def test_extras_that_are_no_vectors_are_named(golden):
    model = golden["llama"]
    with pytest.raises(FormatError, match=r"'lm_head.weight' is no vector.*\[weight\]"):
        load(model.path / "lora_saved", model, extras="adapt")


def test_mutation_a_vector_of_another_layer_is_seen(golden, monkeypatch):
    model, right = golden["bert"], NameMap.vectors

    def turned(self, sites):
        found = right(self, sites)
        return {n: (p, ((i[0] + 1) % 3,) if i else i) for n, (p, i) in found.items()}

    monkeypatch.setattr(NameMap, "vectors", turned)
    path = model.path / "lora_bias_all"
    adapter = load(path, model, extras="adapt")
    want = safetensors_file.read(path / "expected.safetensors")[0]["expected"]
    got = jax.jit(model.fn)(jl.merge(model.params, adapter), *model.args)
    assert error(got, want) > 1e-4

"""Name maps of real packages, on the trees that they made and against torch + PEFT.

`tests/golden/make_stacks.py` ran the packages: each golden file holds the tree of a tiny model, its
logits with weights that are drawn by their paths, and its logits with an adapter merged. Here
transformers' model gets the same weights by the name map, and PEFT the adapter that jlora wrote.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora import io
from jlora.core.site import fold
from jlora.io import safetensors_file
from jlora.io.model_sites import model_sites
from tests.golden import make_stacks

GOLDEN = {path.stem: path for path in sorted(make_stacks.FOLDER.glob("*.json"))}
WEIGHTS, ROOT = "adapter_model.safetensors", "base_model.model."


def linear(leaves, names):
    """Module -> (path, index, the site of one slice), without embedding tables."""
    sites = model_sites(leaves, names).sites
    table = names.table(sites.values())
    found = {m: (path, index, sites[path].slice()) for m, (path, index) in table.items()}
    return {m: row for m, row in found.items() if not m.endswith("embed_tokens")}


def written(folder, leaves, names):
    """A PEFT directory of all linear modules, by torch's names alone."""
    tensors = {}
    for module, (_, _, site) in linear(leaves, names).items():
        a, b = make_stacks.factors(module, site.d_in, site.d_out)
        tensors[f"{ROOT}{module}.lora_A.weight"] = a
        tensors[f"{ROOT}{module}.lora_B.weight"] = b
    safetensors_file.write(folder / WEIGHTS, tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": make_stacks.RANK, "lora_alpha": make_stacks.ALPHA}
    config["target_modules"] = sorted(linear(leaves, names))
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read(name):
    data = json.loads(GOLDEN[name].read_text(encoding="utf-8"))
    leaves = {
        path: jnp.asarray(make_stacks.weight(path, tuple(shape)), dtype)
        for path, (dtype, *shape) in data["tree"].items()
    }
    names = getattr(io, make_stacks.STACKS[name].names)(**make_stacks.OPTIONS.get(name, {}))
    return data, leaves, names


def twin(data, leaves, names):
    """transformers' model with the weights of the tree, every parameter given once."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dict(data["config"])
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    given = {"model.embed_tokens.weight": np.asarray(table_of(leaves, names))}
    sites = model_sites(leaves, names).sites

    def sliced(path, index):
        stack = [k for k, kind in enumerate(sites[path].kinds) if kind == "s"]
        return np.moveaxis(np.asarray(leaves[path]), stack, range(len(stack)))[index]

    for module, (path, index, site) in linear(leaves, names).items():
        w = jnp.asarray(sliced(path, index))
        given[f"{module}.weight"] = np.asarray(fold(w, site.kinds)).T
    for name, (path, index) in names.vectors(sites.values()).items():
        given[name] = sliced(path, index).reshape(-1)  # Keras: heads x features
    wanted = set(dict(model.named_parameters()))
    assert set(given) == wanted, (sorted(wanted - set(given)), sorted(set(given) - wanted))
    model.load_state_dict({k: torch.tensor(v) for k, v in given.items()}, strict=False)
    if "easydel" in data["versions"]:  # it keeps its tables of cosines and sines in bfloat16
        exact = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda *x, **at: [
            t.bfloat16().float() for t in exact(*x, **at)
        ]
    return model


def table_of(leaves, names):
    found = {p: names.find(p) for p in leaves}
    (path,) = [p for p, m in found.items() if m and m.rule.template.endswith("embed_tokens")]
    return leaves[path]


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(make_stacks.IDS), use_cache=False).logits.double().numpy()


def near(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", GOLDEN)
def test_every_leaf_has_a_name_and_names_lead_back(name, tmp_path):
    _, leaves, names = read(name)
    assert [path for path in leaves if names.find(path) is None] == []
    written(tmp_path, leaves, names)
    adapter = io.load_peft(tmp_path, names, leaves)
    io.save_peft(tmp_path / "again", adapter, names)
    a, b = (safetensors_file.read(p / WEIGHTS)[0] for p in (tmp_path, tmp_path / "again"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    matrices = {p for p, v in leaves.items() if v.ndim > 1 and "bias" not in p and "norm" not in p}
    assert len({s.path for s, _ in adapter.sites}) >= len(matrices) - 1  # but the embedding table


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", GOLDEN)
def test_peft_on_torch_gives_the_logits_of_the_package(name, tmp_path):
    peft = pytest.importorskip("peft")
    data, leaves, names = read(name)
    model = twin(data, leaves, names)
    near(logits(model), np.asarray(data["logits"]))
    written(tmp_path, leaves, names)
    adapter = io.load_peft(tmp_path, names, leaves)
    io.save_peft(tmp_path / "again", adapter, names, task_type="CAUSAL_LM")
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "again").eval()
    want = np.asarray(data["adapted"])
    assert np.abs(want - data["logits"]).max() > 0.05 * np.abs(want).max()
    near(logits(tuned), want)


def test_mutation_parts_in_the_other_order_are_seen():
    data, leaves, names = read("tunix-gemma3")
    rules = {
        k: (t.replace("k_proj|v_proj", "v_proj|k_proj"), s) for k, (t, s) in names.rules.items()
    }
    with pytest.raises(AssertionError):
        near(logits(twin(data, leaves, jl.io.NameMap(rules))), np.asarray(data["logits"]))


def test_maxtext_models_that_renaming_does_not_convert():
    with pytest.raises(ValueError, match=r"got model 'llama2', expected 'qwen3'; .*sqrt"):
        io.maxtext("llama2")

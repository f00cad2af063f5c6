"""What an adapter of ours brings along, in the real PEFT on torch: its outputs are ours.

Biases, saved modules, trained rows, replicated layers, patterns, bare parameters: each made here,
written by our writer, loaded by `PeftModel.from_pretrained`.
"""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import NameMap, replicate_layers, safetensors_file
from jlora.io.peft import write as peft_write
from jlora.methods.selective.trainable_tokens import TrainableTokens
from tests.io.shared import error, torch_model, torch_output, trained

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[3] / "third_party" / "peft"
TOLERANCE = 1e-5
PAIRS = [[0, 2], [1, 3]]
BIASES = {
    "attention.self.query": ("attention", "query"),
    "attention.self.key": ("attention", "key"),
    "attention.self.value": ("attention", "value"),
    "attention.output.dense": ("attention", "out"),
    "attention.output.LayerNorm": ("attention", "norm"),
    "intermediate.dense": ("ffn", "up"),
    "output.dense": ("ffn", "down"),
    "output.LayerNorm": ("ffn", "norm"),
}

# Of transformers, about itself; PEFT's own warnings stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def config(path):
    return json.loads((path / "adapter_config.json").read_text())


def output(model, params, adapter):
    return jax.jit(model.fn)(jl.merge(params, adapter), *model.args)


def check(model, params, adapter, folder, **options):
    """PEFT's outputs with what we write are ours with `params`, and not those of the base."""
    jl.io.save_peft(folder, adapter, model.names, **options)
    module = peft.PeftModel.from_pretrained(torch_model(model), folder)
    ours = output(model, params, adapter)
    assert error(ours, model.expected) > 1e-3
    assert error(ours, torch_output(module, model)) <= TOLERANCE
    return ours


def with_biases(params, rng, only):
    """(params with other biases, the same by torch name); of the modules `only`, None: of all."""
    params, extras = jax.tree.map(lambda t: t, params), {}
    for module, (group, name) in BIASES.items():
        if only is None or module in only:
            old = params["layers"][group][name]["bias"]
            new = np.asarray(old + rng.normal(size=old.shape), np.float32)
            params["layers"][group][name] = {
                **params["layers"][group][name],
                "bias": jnp.asarray(new),
            }
            extras |= {f"encoder.layer.{i}.{module}.bias": row for i, row in enumerate(new)}
    if only is None:
        norm = params["embeddings"]["norm"]
        new = np.asarray(norm["bias"] + rng.normal(size=norm["bias"].shape), np.float32)
        params["embeddings"]["norm"] = {**norm, "bias": jnp.asarray(new)}
        extras["embeddings.LayerNorm.bias"] = new
    return params, extras


def check_biases(golden, folder, bias, method):
    model = golden["bert"]
    only = None if bias == "all" else ["attention.self.query", "output.dense"]
    params, extras = with_biases(model.params, np.random.default_rng(0), only)
    methods = {r"attention/query/kernel|ffn/down/kernel": method}
    adapter = trained(model.fn, model.params, model.args, methods)
    ours = check(model, params, adapter, folder, extras=extras)
    assert config(folder)["bias"] == bias
    assert error(output(model, model.params, adapter), ours) > 1e-3


@pytest.mark.parametrize(
    ("bias", "method"),
    [
        ("lora_only", jl.LoRA(rank=2)),
        ("all", jl.DoRA(rank=2)),
        ("lora_only", jl.AdaLoRA(rank=2)),
        ("oft_only", jl.OFT(block=4)),
        ("boft_only", jl.BOFT(block=8)),
    ],
)
def test_biases(golden, tmp_path, monkeypatch, bias, method):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    check_biases(golden, tmp_path, bias, method)


def test_a_saved_module(golden, tmp_path):
    model = golden["llama"]
    adapter = trained(model.fn, model.params, model.args, {"attention/query": jl.LoRA(rank=2)})
    head = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)
    params = {**model.params, "head": {"kernel": jnp.asarray(head.T)}}
    extras = {"lm_head.weight": head}
    ours = check(model, params, adapter, tmp_path, extras=extras)
    assert config(tmp_path)["modules_to_save"] == ["lm_head"]
    assert error(output(model, model.params, adapter), ours) > 1e-3


def test_a_saved_norm_and_all_biases(golden, tmp_path):
    """A module that is saved whole, bias and all, alongside biases of others."""
    model, rng = golden["bert"], np.random.default_rng(2)
    params, extras = with_biases(model.params, rng, None)
    scale = rng.normal(size=16).astype(np.float32)
    params["embeddings"]["norm"] = {**params["embeddings"]["norm"], "scale": jnp.asarray(scale)}
    extras["embeddings.LayerNorm.weight"] = scale
    adapter = trained(model.fn, model.params, model.args, {"attention/value/kernel": jl.LoRA(2)})
    check(model, params, adapter, tmp_path, extras=extras)
    told = config(tmp_path)
    assert told["bias"] == "all" and told["modules_to_save"] == ["embeddings.LayerNorm"]


def test_replicated_layers(golden, tmp_path):
    model = golden["llama"]
    params = replicate_layers(model.params, PAIRS)
    methods = {"attention/(query|out)|ffn/down": jl.LoRA(rank=2, alpha=3.0)}
    adapter = trained(model.fn, params, model.args, methods)
    assert adapter.trainable["layers/ffn/down/kernel"]["a"].shape[0] == 4
    check(model, params, adapter, tmp_path, layer_replication=PAIRS)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_trained_rows(golden, tmp_path, kind):
    model = golden[kind]
    table = "embeddings/word/embedding" if kind == "bert" else "embed_tokens/embedding"
    ids = [int(i) for i in np.unique(model.args[0])[[1, 4, 7]]]
    methods = {table: TrainableTokens(tuple(ids[::-1])), "attention/key/kernel": jl.LoRA(rank=2)}
    adapter = trained(model.fn, model.params, model.args, methods)
    ours = check(model, model.params, adapter, tmp_path)
    rows = {**adapter.trainable, table: {"rows": rows_of(model.params, table, ids[::-1])}}
    assert error(output(model, model.params, adapter.replace(trainable=rows)), ours) > 1e-3


def rows_of(params, path, ids):
    for key in path.split("/"):
        params = params[key]
    return params[jnp.asarray(ids)]


def test_trained_rows_of_a_table_that_is_the_head_as_well(golden, tmp_path):
    model = golden["llama"]

    def tied(params, *args):
        head = {"kernel": params["embed_tokens"]["embedding"].T}
        return model.fn({**params, "head": head}, *args)

    params = {k: v for k, v in model.params.items() if k != "head"}
    methods = {"embed_tokens": TrainableTokens((3, 30, 7)), "attention/key": jl.LoRA(rank=2)}
    adapter = trained(tied, params, model.args, methods)
    jl.io.save_peft(tmp_path, adapter, model.names)
    base = torch_model(model)
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    module = peft.PeftModel.from_pretrained(base, tmp_path)
    run = jax.jit(tied)
    ours = run(jl.merge(params, adapter), *model.args)
    assert error(ours, run(params, *model.args)) > 1e-3
    assert error(ours, torch_output(module, model)) <= TOLERANCE


def test_ranks_alphas_and_layers_that_differ(golden, tmp_path):
    model = golden["llama"]
    methods = {
        "attention/query": jl.LoRA(rank=2, alpha=3.0),
        "attention/value": jl.LoRA(rank=5, alpha=1.0),
        "ffn/up": jl.LoRA(rank=2, alpha=7.0),
    }
    adapter = trained(model.fn, model.params, model.args, methods)
    cut = {k: dict(v) for k, v in adapter.trainable.items()}
    up, value = cut["layers/ffn/up/kernel"], cut["layers/attention/value/kernel"]
    cut["layers/ffn/up/kernel"] = {k: v.at[1].set(0) for k, v in up.items()}  # no layer 1
    a, b = value["a"], value["b"]
    cut["layers/attention/value/kernel"] = {"a": a.at[2, :, 3:].set(0), "b": b.at[2, 3:].set(0)}
    scale = adapter.frozen["layers/attention/value/kernel"]["scale"].at[2].set(0.5)
    frozen = {**adapter.frozen, "layers/attention/value/kernel": {"scale": scale}}
    check(model, model.params, adapter.replace(trainable=cut, frozen=frozen), tmp_path)
    told = config(tmp_path)
    assert sorted(told["rank_pattern"].values()) == [3, 5, 5]
    assert not any("layers.1.mlp.up_proj" in name for name in told["target_modules"])


def test_everything_at_once(golden, tmp_path):
    """Rows, a saved head and replicated layers in one adapter."""
    model = golden["llama"]
    params = replicate_layers(model.params, PAIRS)
    methods = {
        "embed_tokens": TrainableTokens((9, 1, 4)),
        "attention/query": jl.LoRA(rank=2, rslora=True),
        "ffn/down": jl.LoRA(rank=3, rslora=True),
    }
    adapter = trained(model.fn, params, model.args, methods)
    head = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)
    options = {"extras": {"lm_head.weight": head}, "layer_replication": PAIRS}
    params = {**params, "head": {"kernel": jnp.asarray(head.T)}}
    check(model, params, adapter, tmp_path, **options)
    back = jl.io.load_peft(
        tmp_path, model.names, params, extras="leave", layer_replication=PAIRS, layout="in_out"
    )
    chex.assert_trees_all_equal(adapter.trainable, back.trainable)


# PEFT looks for the patterns of parameters among modules, and uses them all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_bare_parameters_of_ranks_and_alphas_that_differ(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "golden")
    import make_peft

    state, _ = safetensors_file.read(GOLDEN / "experts" / "base.safetensors")
    one = NameMap({r"(\d)/(up|down)": r"layers.\1.experts[\2]"})
    rules = {rf"(\d)/{name}": rf"layers.\1.experts[{name}]" for name in ("up", "down")}
    names = NameMap({**rules, r"(\d)/gate": r"layers.\1.gate"})
    params = {
        f"{i}": {
            "gate": jnp.asarray(state[f"layers.{i}.gate.weight"].T),
            **{
                name: jnp.asarray(state[f"layers.{i}.experts.{name}"].swapaxes(1, 2))
                for name in ("up", "down")
            },
        }
        for i in range(2)
    }

    def other(x, i, name):  # of the experts that no adapter is on, stored [E, in, out]
        up, down = (jnp.asarray(state[f"layers.{i}.{name}.{k}"]) for k in ("up", "down"))
        return jnp.einsum("ebi,eio->ebo", jnp.tanh(jnp.einsum("ebi,eio->ebo", x, up)), down)

    def model(params, x):
        for i in range(2):
            p, every = params[f"{i}"], jnp.broadcast_to(x, (3, *x.shape))
            h = jnp.tanh(jnp.einsum("ebi,eio->ebo", every, p["up"]))
            y = jnp.einsum("ebi,eio->ebo", h, p["down"])
            y += other(every, i, "turned") + other(every, i, "flat")
            x = x + jnp.einsum("be,ebo->bo", jax.nn.softmax(x @ p["gate"]), y)
        return x

    x = jnp.asarray(state["x"])
    methods = {
        "0/up": jl.LoRA(rank=3, alpha=2.0),
        "1/up": jl.LoRA(rank=1, alpha=5.0),
        "./down": jl.LoRA(rank=2, alpha=3.0),
        "1/gate": jl.LoRA(rank=2, alpha=1.0),
    }
    adapter = trained(model, params, (x,), methods)
    with pytest.raises(ValueError, match=r"'layers\.0\.experts' need a rule each"):
        jl.io.save_peft(tmp_path / "x", adapter, one)
    jl.io.save_peft(tmp_path, adapter, names)
    base = make_peft.Mixture()
    base.load_state_dict({k: torch.from_numpy(v) for k, v in state.items() if "layers" in k})
    module = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        theirs = module(torch.from_numpy(state["x"])).numpy()
    ours = jax.jit(model)(jl.merge(params, adapter), x)
    assert error(ours, state["expected"]) > 1e-2 and error(ours, theirs) <= TOLERANCE


def test_mutation_biases_that_peft_does_not_find_are_seen(golden, tmp_path, monkeypatch):
    good = peft_write.extra_tensors

    def lost(*args):
        tensors, told = good(*args)
        return {k.replace(".base_layer.", "."): t for k, t in tensors.items()}, told

    monkeypatch.setattr("jlora.io.peft.directory.extra_tensors", lost)
    with pytest.raises((AssertionError, Warning)):
        check_biases(golden, tmp_path, "lora_only", jl.LoRA(rank=2))

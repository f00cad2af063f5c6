"""Tables and convolutions through the command: adapters by the real PEFT, its outputs on torch.

The table and the matrix are square: there a wrong layout is no wrong shape, and has to be seen in
the numbers.
"""

import copy
import types

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jlora as jl
from jlora.cli.merge import layout
from jlora.cli.merge import main as command
from jlora.cli.merge.base import Base
from jlora.cli.merge.config import PLAIN
from jlora.core.site import unfold
from jlora.io import safetensors_file, torch_layout

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

MODULES = ("table", "linear", "conv1", "conv2")
WEIGHTS = (0.6, -0.4)
TOKENS = [[0, 3, 5, 1, 1, 2], [2, 4, 0, 5, 3, 3]]


class Net(torch.nn.Module):
    """Tokens [2, 6] to outputs [2, 36], through a layer of each kind."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(6, 6)
        self.linear = torch.nn.Linear(6, 6)
        self.conv1 = torch.nn.Conv1d(4, 4, 2)
        self.conv2 = torch.nn.Conv2d(2, 4, 2)

    def forward(self, tokens):
        h = torch.tanh(self.linear(self.table(tokens)))
        h = torch.tanh(self.conv1(h.reshape(-1, 4, 9)))
        return self.conv2(h.reshape(-1, 2, 4, 4)).flatten(1)


def adapted(net, config, seed):
    """A copy of the net with an adapter of noise."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(net), config)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def inner(model, module):
    return model.base_model.model.get_submodule(module)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The base and two LoRAs of other ranks and scales, as files, and PEFT's deltas of them."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    net = Net()
    state = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    (folder / "base").mkdir()
    safetensors_file.write(folder / "base/model.safetensors", state, {"format": "pt"})
    targets = list(MODULES)
    configs = {
        "one": peft.LoraConfig(r=3, lora_alpha=4, target_modules=targets),
        "two": peft.LoraConfig(
            r=3, lora_alpha=2, use_rslora=True, target_modules=targets,
            rank_pattern={"conv2": 1, "table": 2}, alpha_pattern={"conv1": 5},
        ),
    }  # fmt: skip
    deltas = []
    for seed, (name, config) in enumerate(configs.items()):
        model = adapted(net, config, seed + 1)
        model.save_pretrained(folder / name)
        found = {m: inner(model, m).get_delta_weight("default") for m in MODULES}
        deltas.append({m: d.detach().numpy().astype(np.float64) for m, d in found.items()})
    return types.SimpleNamespace(folder=folder, net=net, state=state, deltas=deltas)


@pytest.fixture
def job(world, tmp_path):
    """job(...) merges the two LoRAs, or `models`; returns the target."""

    def run(method="concat", form="merged", models=("one", "two"), weights=WEIGHTS, base=True,
            fails=False, **changes):  # fmt: skip
        config = {
            "merge_method": method,
            "models": [
                {"model": str(world.folder / m), "parameters": {"weight": w}}
                for m, w in zip(models, weights, strict=True)
            ],
            "out": {"path": f"out_{form}", "format": form},
            **({"base_model": str(world.folder / "base")} if base else {}),
            **changes,
        }  # fmt: skip
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
        argv = ["--config", str(tmp_path / "merge.yaml"), "--overwrite"]
        assert command.main(argv) == (2 if fails else 0)
        assert not fails or not (tmp_path / f"out_{form}").exists()
        return tmp_path / f"out_{form}"

    return run


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).numpy()


def plain(world, tensors):
    net = Net()
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
    return outputs(net)


def summed(world, module, weights=WEIGHTS):
    """The weighted sum of PEFT's dense deltas, as torch has the weight."""
    return sum(w * each[module] for w, each in zip(weights, world.deltas, strict=True))


def weighted(world):
    """The base with it."""
    changed = {f"{m}.weight": world.state[f"{m}.weight"] + summed(world, m) for m in MODULES}
    return world.state | {k: v.astype(np.float32) for k, v in changed.items()}


def error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def file_of(out):
    return safetensors_file.read(out / "model.safetensors")[0]


def logits(world, out, form, job):
    """Of the result of a merge, by PEFT or in the plain model."""
    if form == "peft":
        return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(world.net), out))
    if form == "orbax":
        out = job(models=(out,), weights=(1.0,))
    return plain(world, file_of(out))


@pytest.mark.parametrize("form, base", [("peft", True), ("peft", False), ("merged", True),
                                        ("orbax", True)])  # fmt: skip
@pytest.mark.parametrize("method", ["concat", "truncated"])
def test_weighted_sums_compute_what_pefts_dense_deltas_do(method, form, base, world, job):
    """Two exact methods, in every format, read with and without the base's shapes."""
    parameters = {"rank": 6} if method == "truncated" else {}
    out = job(method, form, base=base, parameters=parameters)
    want = plain(world, weighted(world))
    assert error(outputs(world.net), want) > 0.1
    assert error(logits(world, out, form, job), want) <= 1e-5


def merged_deltas(world, out):
    new = file_of(out)
    for name, old in world.state.items():
        if name.removesuffix(".weight") not in MODULES:
            np.testing.assert_array_equal(new[name], old)
    return {m: new[f"{m}.weight"].astype(np.float64) - world.state[f"{m}.weight"] for m in MODULES}


def ties(x, w, density):
    """[N, ...] -> [...]: the k largest of each, the sign of the weighted sum, their mean."""
    kept = []
    for d in x:
        k = int(density * d.size)
        kept.append(np.where(np.abs(d) >= np.sort(np.abs(d).ravel())[-k], d, 0.0))
    y = np.stack([c * d for c, d in zip(w, kept, strict=True)])
    sign = np.where(y.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(y) == sign
    share = (agree * np.reshape(w, (-1, *[1] * sign.ndim))).sum(0)
    return (y * agree).sum(0) / np.where(share == 0, 1.0, share)


def check_ties(world, out, w, density):
    for module, got in merged_deltas(world, out).items():
        want = ties(np.stack([d[module] for d in world.deltas]), w, density)
        assert error(got, want) <= 1e-5, module


def test_ties_by_elements_of_torchs_weights(world, job):
    w = (0.6, 0.3)
    out = job("ties", weights=w, parameters={"density": 0.4})
    check_ties(world, out, w, 0.4)
    with pytest.raises(AssertionError):
        check_ties(world, out, w, 0.5)
    again = job("ties", "peft", weights=w, parameters={"density": 0.4})
    assert error(logits(world, again, "peft", job), plain(world, file_of(out))) <= 1e-5


def test_dare_drops_elements_of_torchs_weights(world, job):
    """Each element is one of the four sums of kept or dropped ones; all are there."""
    w = (0.6, 0.3)
    out = job("dare_linear", weights=w, parameters={"density": 0.5, "rescale": False}, seed=3)
    for module, got in merged_deltas(world, out).items():
        one, two = (c * d[module] for c, d in zip(w, world.deltas, strict=True))
        sums = np.stack([0 * one, one, two, one + two])
        gaps = np.abs(sums - got)
        assert gaps.min(0).max() <= 1e-5 * np.abs(sums).max(), module
        assert len(np.unique(gaps.argmin(0))) == 4, module


@pytest.mark.parametrize("kind", ["linear", "cat", "ties", "svd"])
def test_pefts_merges_of_factors_are_pefts(kind, world, job, tmp_path):
    """`add_weighted_adapter` of two adapters of one rank and scale 1; PEFT's SVD lacks Conv1d."""
    modules = [m for m in MODULES if kind != "svd" or m != "conv1"]
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules)
    for k in range(2):
        adapted(world.net, config, k + 11).save_pretrained(tmp_path / str(k))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(world.net), tmp_path / "0", "a")
    model.load_adapter(tmp_path / "1", "b")
    density = {"density": 0.5} if kind == "ties" else {}
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", combination_type=kind, **density)
    models = (tmp_path / "0", tmp_path / "1")
    out = job(f"peft_{kind}", models=models, weights=(0.7, 0.4), parameters=density)
    got = merged_deltas(world, out)
    for module in modules:
        want = inner(model, module).get_delta_weight("c").detach().numpy()
        assert error(got[module], want) <= 1e-5, module


def test_iso_c_by_the_svd_of_torchs_weights(world, job):
    """Spectral: one singular value for the directions of the sum, for any order of inputs."""
    out = job("iso_c")
    for module, got in merged_deltas(world, out).items():
        total = summed(world, module)
        x, s, y = np.linalg.svd(total.reshape(len(total), -1), full_matrices=False)
        live = s > 1e-6 * s[0]
        want = s[live].mean() * (x[:, live] @ y[live])
        assert error(got.reshape(want.shape), want) <= 1e-4, module


def test_types_that_need_the_base(world, job, tmp_path):
    """DoRA (of the table as well) and LoHa alongside LoRA, against PEFT's own merge of each."""
    targets = list(MODULES)
    configs = {
        "dora": peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=targets),
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=targets[1:]),
    }
    total = {m: 0.5 * world.deltas[0][m] for m in MODULES}
    for seed, (name, config) in enumerate(configs.items()):
        model = adapted(world.net, config, seed + 5)
        model.save_pretrained(tmp_path / name)
        state = model.merge_and_unload().state_dict()
        for m in config.target_modules:
            new, old = state[f"{m}.weight"].numpy(), world.state[f"{m}.weight"]
            total[m] = total[m] + 0.7 * (new.astype(np.float64) - old)
    models = ("one", tmp_path / "dora", tmp_path / "loha")
    out = job(models=models, weights=(0.5, 0.7, 0.7), missing="zero")
    for module, got in merged_deltas(world, out).items():
        assert error(got, total[module]) <= 1e-5, module
    job(models=models, weights=(1, 1, 1), base=False, form="peft", fails=True)


def test_doras_of_a_table_go_back_to_peft_bitwise(world, tmp_path):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=list(MODULES))
    model = adapted(world.net, config, 7)
    model.save_pretrained(tmp_path / "dora")
    params = Base(world.folder / "base").params({"table"})
    adapter = jl.io.load_peft(tmp_path / "dora", PLAIN, params)
    jl.io.save_peft(tmp_path / "ours", adapter, PLAIN)
    file = "adapter_model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "dora" / file).read_bytes()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(world.net), tmp_path / "ours")
    np.testing.assert_array_equal(outputs(again), outputs(model))
    with pytest.raises(
        jl.io.FormatError, match=r"table: got .*lora_embedding_A.*expected .*lora_A"
    ):
        jl.io.load_peft(tmp_path / "dora", PLAIN, Base(world.folder / "base").params())


@pytest.mark.parametrize("flax", [True, False])
def test_orbax_checkpoints_keep_the_layout_of_their_model(flax, world, job, tmp_path):
    """Kernels [*window, in, out] or [out, in, *window] in the checkpoint; a PEFT one too."""
    sites = []
    for m in MODULES:
        site = layout.site_of(
            m, world.state[f"{m}.weight"].shape, jnp.dtype("float32"), m == "table"
        )
        if "conv" in site.ops and not flax:
            shape = world.state[f"{m}.weight"].shape
            site = jl.Site(site.path, shape, "o" + "i" * (len(shape) - 1), site.dtype, site.ops)
        sites.append(site)
    names = jl.io.NameMap({r"(.+)/\w+": r"\1"})
    jl.io.save_adapter(tmp_path / "x", jl.io.load_peft(world.folder / "one", names, sites))
    out = job(models=(tmp_path / "x", "two"))
    assert error(plain(world, file_of(out)), plain(world, weighted(world))) <= 1e-5
    back = jl.io.restore_adapter(job(models=(tmp_path / "x", "two"), form="orbax"))
    assert [s.kinds for s, _ in back.sites] == [
        s.kinds for s in sorted(sites, key=lambda s: s.path)
    ]
    for site, _ in back.sites:
        u, v = jl.algebra.deltas(back)[site.path]
        leaf = unfold(u @ v, site.kinds, site.shape)
        want = summed(world, site.path.partition("/")[0])
        if "dot" in site.ops or ("conv" in site.ops and flax):
            want = np.moveaxis(want, (0, 1), (-1, -2))
        assert error(leaf, want) <= 1e-5, site.path


def flipped(part):
    """`layout.to_torch` with the two axes of one kind of site swapped."""
    good = layout.to_torch

    def bad(site, matrix):
        t = good(site, matrix)
        if part in site.ops:
            t = t.T if t.ndim == 2 else np.ascontiguousarray(np.swapaxes(t, 1, 2)).reshape(t.shape)
        return t

    return bad


@pytest.mark.parametrize("part", ["gather", "dot", "conv"])
def test_mutation_swapped_axes_of_merged_weights_are_seen(part, world, job, monkeypatch):
    monkeypatch.setattr(layout, "to_torch", flipped(part))
    got = plain(world, file_of(job()))
    assert error(got, plain(world, weighted(world))) > 1e-2


def test_mutation_another_order_of_inputs_in_peft_files_is_seen(world, job, monkeypatch):
    good = torch_layout._patch
    out = job(form="orbax")
    monkeypatch.setattr(torch_layout, "_patch", lambda site: (*good(site)[:2], False))
    again = job(form="peft", models=(out,), weights=(1.0,), base=False)
    assert error(logits(world, again, "peft", job), plain(world, weighted(world))) > 1e-2


def test_mutation_another_weight_of_one_adapter_is_seen(world, job):
    got = plain(world, file_of(job(weights=(0.6, -0.41))))
    assert error(got, plain(world, weighted(world))) > 1e-3

"""PEFT's further types: its files read, computed and written again, and ours in the real PEFT."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file
from tests.io.shared import error

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "third_party" / "peft_types"
NAMES = NameMap({r"layers/(up|down)": r"layer.{i}.\1", "bias": "layer.{i}.up[bias]"})
EXAMPLES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
READ_ONLY = ("frod",)
WRITTEN = [name for name in EXAMPLES if name not in READ_ONLY]
DRAWN = ("randlora_sparse", "pvera_seed", "tinylora_seed")
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@jax.jit
def model(params, x):
    for i in range(2):
        p = {name: w[i] for name, w in params["layers"].items()}
        x = x + jnp.tanh(x @ p["up"] + params["bias"][i][None]) @ p["down"]
    return x


@pytest.fixture(scope="module")
def base():
    """The golden model: state by torch's names, params, x, expected, and the sites."""
    state, _ = safetensors_file.read(GOLDEN / "base.safetensors")
    layers = {
        name: jnp.asarray(np.stack([state[f"layer.{i}.{name}.weight"].T for i in range(2)]))
        for name in ("up", "down")
    }
    bias = jnp.asarray(np.stack([state[f"layer.{i}.up.bias"] for i in range(2)]))
    params, x = {"layers": layers, "bias": bias}, jnp.asarray(state["x"])
    sites = jl.sites(model, params, x)
    return SimpleNamespace(state=state, params=params, x=x, sites=sites, expected=state["expected"])


def load(base, folder):
    return jl.io.load_peft(folder, NAMES, base.params, layout="in_out")


def output(base, adapter):
    if not all(method.merges for _, method in adapter.sites):
        return jl.lift(model)(base.params, adapter, base.x)
    return model(jl.merge(base.params, adapter), base.x)


def check_value(base, name):
    want = safetensors_file.read(GOLDEN / name / "expected.safetensors")[0]["expected"]
    assert error(base.expected, want) > 1e-3
    assert error(output(base, load(base, GOLDEN / name)), want) <= TOLERANCE


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_computes_what_peft_computes(base, name):
    check_value(base, name)


@pytest.mark.parametrize("name", WRITTEN)
def test_it_goes_back_bitwise(base, tmp_path, name):
    jl.io.save_peft(tmp_path, load(base, GOLDEN / name), NAMES, params=base.params)
    if name in DRAWN:  # written with the bases that the file has only the seed of
        old, new = (safetensors_file.read(f / WEIGHTS)[0] for f in (GOLDEN / name, tmp_path))
        assert all(np.array_equal(new[key], tensor) for key, tensor in old.items())
    else:
        assert (tmp_path / WEIGHTS).read_bytes() == (GOLDEN / name / WEIGHTS).read_bytes()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch, of SHiRA
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")  # BEFT
@pytest.mark.parametrize("name", WRITTEN)
def test_real_peft_computes_the_same_of_what_we_write(base, tmp_path, monkeypatch, name):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_peft_types

    rng, read = np.random.default_rng(len(name)), load(base, GOLDEN / name)
    move = lambda t: t + jnp.asarray(0.2 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    adapter = read.replace(trainable=jax.tree.map(move, read.trainable))
    jl.io.save_peft(tmp_path, adapter, NAMES, params=base.params)
    module = make_peft_types.Model()
    weights = {k: torch.from_numpy(v) for k, v in base.state.items() if k.startswith("layer")}
    module.load_state_dict(weights)
    tuned = peft.PeftModel.from_pretrained(module, tmp_path).eval()
    with torch.no_grad():
        theirs = tuned(torch.from_numpy(base.state["x"])).numpy()
    ours = output(base, adapter)
    assert error(ours, output(base, read)) > 1e-3
    assert error(ours, theirs) <= TOLERANCE


def edited(tmp_path, name, **fields):
    """A copy of a golden adapter with other fields in its config."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "edited")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


REFUSED = [
    ("miss", {"r": 3}, r"miss_block has shape \[2, (8|12)\], expected \[3, 1\]"),
    ("miss", {"init_weights": "max"}, "init_weights = 'max', expected"),
    ("miss_bat", {"r": 3}, r"r = 3, expected a divisor of (8 and 12|12 and 8)"),
    ("hra", {"r": 3}, r"hra_u has shape \[(8|12), 4\], expected \[(8|12), 3\]"),
    ("c3a", {"block_size": 5, "block_size_pattern": {}}, "block_size = 5, expected a divisor of"),
    ("road", {"group_size": 3}, "group_size = 3, expected an even divisor of 8 outputs"),
    ("road", {"variant": "road_3"}, "variant = 'road_3', expected"),
    ("gralora", {"gralora_k": 3}, "gralora_k = 3, expected a divisor of"),
    ("gralora", {"hybrid_r": 1}, "with hybrid_r = 1"),
    ("shira", {"r": 3}, r"shira_weight has shape \[40\], expected \[60\]"),
    ("shira", {"r": 9}, "r = 9 is more entries than the matrix has"),
    ("super", {"sparsity": 0.5}, r"supertuning_indices has shape \[19\], expected \[48\]"),
    ("super_supra", {"r": None}, "with r = None"),
    (
        "fourierft",
        {"n_frequency": 10, "n_frequency_pattern": {}},
        r"fourierft_spectrum has shape \[(9|14)\], expected \[1",
    ),
    ("fourierft", {"random_loc_seed": -1}, "random_loc_seed = -1, expected 0 or more"),
    ("waveft", {"wavelet_family": "db2"}, "wavelet_family = 'db2', expected"),
    ("randlora", {"r": 4}, r"randlora_lambda has shape \[3, 3\], expected \[4, 2\]"),
    ("pvera", {"r": 2}, r"pvera_lambda_d has shape \[6\], expected \[4\]"),
    ("pvera", {"sample_at_inference": True}, "sample_at_inference = True changes the maths"),
    ("peanut", {"depth": 1}, "with depth = 1"),
    ("peanut", {"act_fn": "mish"}, "act_fn = 'mish', expected"),
    ("deft", {"r": 3}, r"deft_P has shape \[(8|12), 2\], expected \[(8|12), 3\]"),
    ("deft", {"para": True}, "with para = True"),
    ("glora", {"config_A_B": "vector"}, "with config_A_B = 'vector'"),
    ("glora", {"config_A_B": "none"}, "config_A_B = 'none', expected"),
    ("lora_kasa", {"r": 3}, r"lora_diag has shape \[2\], expected \[3\]"),
    ("lora_kasa", {"use_rslora": True}, "use_rslora = True changes the maths"),
    ("tinylora", {"u": 4}, r"tinylora_P has shape \[5, 2, 2\], expected \[4, 2, 2\]"),
    ("tinylora", {"r": 3}, r"tinylora_A has shape \[2, (8|12)\], expected \[3, (8|12)\]"),
    ("tinylora", {"weight_tying": 0.5}, "expected 2 of weight_tying = 0.5"),
    ("tinylora", {"projection_seed": 1}, "tinylora_P is none of the seed 1, so that its vector"),
    ("frod", {"sparse_rate": 2.0}, r"FRoD\.rate: got 2\.0, expected 0 <= it <= 1"),
    ("delora", {"rank_pattern": {}}, r"delora_A has shape \[2, 12\], expected \[3, 12\]"),
]


@pytest.mark.parametrize(("name", "fields", "why"), REFUSED)
def test_what_does_not_fit_is_refused(base, tmp_path, name, fields, why):
    with pytest.raises(FormatError, match=why):
        load(base, edited(tmp_path, name, **fields))


def replaced(tmp_path, name, change):
    """A copy of a golden adapter with other tensors."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "replaced")
    tensors, meta = safetensors_file.read(folder / WEIGHTS)
    data = safetensors_file.to_bytes(
        folder / WEIGHTS, {k: change(v) for k, v in tensors.items()}, meta
    )
    safetensors_file.write_bytes(folder / WEIGHTS, data)
    return folder


def test_reflections_of_which_peft_computes_rounding_errors_are_refused(base, tmp_path):
    """HRA with Gram-Schmidt from PEFT's own paired start: 0 / 0, another model on each machine."""
    pairs = replaced(tmp_path, "hra_gs", lambda u: np.repeat(u[:, :1], 2, axis=1))
    with pytest.raises(FormatError, match="dependent columns"):
        load(base, pairs)
    shutil.rmtree(pairs)
    with pytest.raises(FormatError, match="column of zeros"):
        load(base, replaced(tmp_path, "hra", lambda u: u * (np.arange(4) != 1).astype(u.dtype)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t + 1000, "places outside the matrix"),
        (lambda t: t // 2 * 2, "a place comes twice"),
        (lambda t: t.astype(np.int64), "dtype int64, expected int32"),
    ],
)
@pytest.mark.parametrize("name", ["shira", "super"])
def test_places_that_are_none_are_refused(base, tmp_path, name, change, why):
    def indices(t):
        return change(t) if t.dtype == np.int32 else t

    with pytest.raises(FormatError, match=why):
        load(base, replaced(tmp_path, name, indices))


def test_bases_that_are_others_on_other_machines_are_refused(base, tmp_path):
    """RandLoRA's from a seed: PEFT draws them in bfloat16 or float16, as the machine likes."""
    with pytest.raises(FormatError, match=r"expected \['randlora_A', 'randlora_B'\] to be saved"):
        load(base, edited(tmp_path, "randlora_sparse", sparse=False))


def test_places_that_no_seed_draws_are_refused(base, tmp_path):
    adapter = load(base, GOLDEN / "fourierft")
    frozen = {k: {**v, "rows": v["rows"][:, ::-1]} for k, v in adapter.frozen.items()}
    with pytest.raises(FormatError, match="not those of the seed 777"):
        jl.io.save_peft(tmp_path, adapter.replace(frozen=frozen), NAMES)


@pytest.mark.parametrize("name", ["lora_kasa", "osf", "frod"])
def test_what_is_relative_to_the_weight_needs_it(base, name):
    with pytest.raises(FormatError, match="relative to the base weight; pass params"):
        jl.io.load_peft(GOLDEN / name, NAMES, base.sites)


def test_vectors_that_go_by_the_order_of_torchs_modules(base, tmp_path):
    """TinyLoRA of several: random matrices of the file say the order, others are refused."""
    read, drawn = load(base, GOLDEN / "tinylora"), lambda t: t if t.ndim < 3 else 2 * t
    got = {path: p["group"].tolist() for path, p in read.frozen.items()}
    assert got == {"layers/down": [1, 3], "layers/up": [0, 2]}
    with pytest.raises(FormatError, match="tinylora_P is none of the seed 42"):
        load(base, replaced(tmp_path, "tinylora", drawn))
    doubled = {path: {**p, "p": 2 * p["p"]} for path, p in read.frozen.items()}
    with pytest.raises(FormatError, match=r"is none of the seed 42.*expected tying=1\.0"):
        jl.io.save_peft(tmp_path / "new", read.replace(frozen=doubled), NAMES)
    swapped = {path: {**p, "group": p["group"][::-1]} for path, p in read.frozen.items()}
    with pytest.raises(FormatError, match="down: vector 3, PEFT takes 1; PEFT counts mod"):
        jl.io.save_peft(tmp_path / "new", read.replace(frozen=swapped), NAMES)


def test_tinylora_of_a_table_is_that_of_real_peft(tmp_path):
    """An embedding table, whose factors PEFT keeps the other way round."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"table": torch.nn.Embedding(9, 6)})
    params = {"table": jnp.asarray(module["table"].weight.detach().numpy().copy())}
    config = peft.TinyLoraConfig(r=2, u=3, init_weights="uniform", target_modules=["table"])
    tuned = peft.get_peft_model(module, config)
    tuned.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ids = np.array([3, 0, 8])
    want = tuned.base_model.model["table"](torch.from_numpy(ids)).detach().numpy()
    sites = jl.sites(lambda p, i: p["table"][i], params, jnp.asarray(ids))
    names = NameMap({"table": "table"})
    adapter = jl.io.load_peft(tmp_path / "theirs", names, sites)
    assert error(params["table"][ids], want) > 1e-3
    assert error(jl.merge(params, adapter)["table"][ids], want) <= TOLERANCE
    jl.io.save_peft(tmp_path / "ours", adapter, names)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (
        tmp_path / "theirs" / WEIGHTS
    ).read_bytes()


def test_random_matrices_of_a_seed_that_goes_by_the_order_are_refused(base, tmp_path):
    folder = shutil.copytree(GOLDEN / "tinylora_half", tmp_path / "bare")
    tensors, meta = safetensors_file.read(folder / WEIGHTS)
    bare = {k: v for k, v in tensors.items() if not k.endswith("tinylora_P")}
    data = safetensors_file.to_bytes(folder / WEIGHTS, bare, meta)
    safetensors_file.write_bytes(folder / WEIGHTS, data)
    with pytest.raises(FormatError, match="no tinylora_P, and its seed goes by numbers"):
        load(base, folder)


@pytest.mark.parametrize("rules", [{}, {"bias": "layer.{i}.up[bias]"}])
def test_beft_with_and_without_biases(base, tmp_path, rules):
    """Where the name map knows no bias, a vector is added to what the matrix gives."""
    names = NameMap({r"layers/(up|down)": r"layer.{i}.\1", **rules})
    adapter = jl.io.load_peft(GOLDEN / "beft", names, base.params, layout="in_out")
    kinds = {site.path: type(method).__name__ for site, method in adapter.sites}
    assert kinds == {"layers/down": "OutputBias"} | (
        {"bias": "BEFT"} if rules else {"layers/up": "OutputBias"}
    )
    want = safetensors_file.read(GOLDEN / "beft" / "expected.safetensors")[0]["expected"]
    assert error(jl.lift(model)(base.params, adapter, base.x), want) <= TOLERANCE
    jl.io.save_peft(tmp_path, adapter, names)
    assert (tmp_path / WEIGHTS).read_bytes() == (GOLDEN / "beft" / WEIGHTS).read_bytes()
    with pytest.raises(NotImplementedError, match="OutputBias has no merge"):
        jl.merge(base.params, adapter)


def test_beft_is_of_biases_and_stands_alone(base, tmp_path):
    read = load(base, GOLDEN / "beft")
    read = read.replace(sites=tuple(row for row in read.sites if row[0].path == "bias"))
    weight = NameMap({"bias": "layer.{i}.up[weight]"})
    with pytest.raises(FormatError, match="PEFT calls it 'weight'; BEFT is of biases"):
        jl.io.save_peft(tmp_path, read, weight)
    lora = jl.init(
        jax.random.key(0), model, base.params, base.x, methods={"layers/up": jl.LoRA(rank=2)}
    )
    both = lora.replace(
        trainable={**lora.trainable, **read.trainable}, sites=(*lora.sites, *read.sites)
    )
    with pytest.raises(FormatError, match="expected BEFT alone"):
        jl.io.save_peft(tmp_path, both, NAMES)


def test_directions_that_are_equally_large_are_refused(base):
    """OSF: which of them PEFT keeps is the choice of its SVD."""
    eye = jnp.broadcast_to(jnp.eye(8, 12), (2, 8, 12))
    layers = {"up": eye, "down": eye.mT}
    with pytest.raises(FormatError, match=r"singular values (3 and 4|6 and 7) of the weight are"):
        params = {**base.params, "layers": layers}
        jl.io.load_peft(GOLDEN / "osf", NAMES, params, layout="in_out")


def test_osf_projects_gradients_as_peft_does(base, monkeypatch):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_peft_types

    adapter = load(base, GOLDEN / "osf")

    def loss(trainable):
        return jnp.sum(jl.lift(model)(base.params, adapter.replace(trainable=trainable), base.x))

    got = jax.jit(jax.grad(loss))(adapter.trainable)["layers/up"]
    module = make_peft_types.Model()
    weights = {k: torch.from_numpy(v) for k, v in base.state.items() if k.startswith("layer")}
    module.load_state_dict(weights)
    tuned = peft.PeftModel.from_pretrained(module, GOLDEN / "osf", is_trainable=True)
    tuned(torch.from_numpy(base.state["x"])).sum().backward()
    for name, parameter in tuned.named_parameters():
        if "layer.1.up" in name and parameter.grad is not None:
            ours = got[{"U_low": "v", "S_low": "s", "V_low": "u"}[name.rpartition(".")[2]]][1]
            assert error(ours, parameter.grad.numpy().T) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch
def test_frod_is_not_written_as_peft_decomposes_again(base, tmp_path, monkeypatch):
    """FRoD: one file, two outputs in PEFT, if eigenvectors have other signs; ours is the file's."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_peft_types

    weights = {k: torch.from_numpy(v) for k, v in base.state.items() if k.startswith("layer")}
    eigh, outputs = torch.linalg.eigh, []

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.where(torch.arange(len(values)) == 0, -1.0, 1.0)

    for one in (eigh, flipped):
        monkeypatch.setattr(torch.linalg, "eigh", one)
        module = make_peft_types.Model()
        module.load_state_dict(weights)
        tuned = peft.PeftModel.from_pretrained(module, GOLDEN / "frod").eval()
        with torch.no_grad():
            outputs.append(tuned(torch.from_numpy(base.state["x"])).numpy())
    assert error(*outputs) > 1e-2
    with pytest.raises(FormatError, match="FRoD"):
        jl.io.save_peft(tmp_path, load(base, GOLDEN / "frod"), NAMES)


@pytest.mark.parametrize("kind", ["psoft", "adamss"])
def test_what_depends_on_choices_that_no_file_holds_is_refused(base, tmp_path, monkeypatch, kind):
    """One file and one base, two outputs, if an SVD has other signs or k-means other labels."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_peft_types

    both = ["up", "down"]
    if kind == "adamss":
        place, name = pytest.importorskip("sklearn.cluster").KMeans, "fit_predict"
        config = peft.AdamssConfig(r=3, num_subspaces=2, subspace_rank=2, target_modules=both)
    else:
        config, place, name = peft.PsoftConfig(r=3, target_modules=both), torch.linalg, "svd"
    module = make_peft_types.Model().eval()
    tuned = peft.get_peft_model(module, config)
    make_peft_types.randomise(tuned, 0)
    tuned.save_pretrained(tmp_path)
    state, good, outputs = module.state_dict(), getattr(place, name), []

    def flipped(*args, **options):
        if kind == "adamss":
            return 1 - good(*args, **options)
        u, s, v = good(*args, **options)
        sign = torch.where(torch.arange(len(s)) == 0, -1.0, 1.0)
        return u * sign, s, v * sign[:, None]

    for one in (good, flipped):
        monkeypatch.setattr(place, name, one)
        again = make_peft_types.Model()
        again.load_state_dict(
            {k.replace(".base_layer", ""): v for k, v in state.items() if kind not in k}
        )
        loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
        with torch.no_grad():
            outputs.append(loaded(torch.from_numpy(base.state["x"])).numpy())
    assert error(*outputs) > 1e-2
    with pytest.raises(FormatError, match="depends on the signs of singular vectors"):
        load(base, tmp_path)


def test_the_table_of_the_guide_is_true():
    """Read and written are those of `TABLES`; every type of PEFT has one row."""
    # its table says that no module's matrix is written with it
    peft = pytest.importorskip("peft")
    from jlora.io.peft.tables import TABLES

    lines = (ROOT / "docs" / "guide" / "peft_types.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    rows = {row[0]: row for row in rows[2:]}
    assert sorted(rows) == sorted(kind.value for kind in peft.PeftType)
    methods, written = {}, {"TRAINABLE_TOKENS"}
    for table in TABLES:
        methods.setdefault(table.type, set()).add(f"`{table.method.__name__}`")
        written |= {table.type} if table.writes else set()
    for kind, row in rows.items():
        said = ["yes" if kind in those else "no" for those in (methods, written)]
        assert row[2:4] == said, kind
        assert methods.get(kind, set()) <= set(row[1].split(", ")), kind


@pytest.mark.parametrize("name", ["road", "glora"])
def test_biases_that_peft_changes_as_well_are_refused(base, tmp_path, name):
    adapter = load(base, GOLDEN / name)
    with pytest.raises(FormatError, match=r"(ROAD|GLORA) scales biases; pass params"):
        jl.io.save_peft(tmp_path, adapter, NAMES)


def test_files_are_those_that_the_script_wrote():
    import hashlib

    lines = (GOLDEN / "METADATA").read_text().split("sha256:\n")[1].splitlines()
    told = dict(reversed(line.split()) for line in lines)
    found = {
        str(p.relative_to(GOLDEN)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in GOLDEN.rglob("*")
        if p.is_file() and p.name != "METADATA"
    }
    assert found == told


def test_mutation_a_transposed_block_is_seen(base, monkeypatch):
    from jlora.methods.blocks.bat import BAT

    good = BAT.merge
    monkeypatch.setattr(BAT, "merge", lambda self, w, p: good(self, w, {"b": p["b"].mT}))
    with pytest.raises(AssertionError):
        check_value(base, "miss_bat")

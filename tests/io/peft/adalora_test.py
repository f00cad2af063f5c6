"""AdaLoRA at the end of its schedule: directions taken out, as PEFT's `rank_pattern` says."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jlora as jl
from jlora.io import FormatError, safetensors_file
from jlora.io.peft import lora as peft_lora
from tests.io.shared import error

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "layers/attention/query/kernel"


@pytest.fixture(scope="module")
def case(golden):
    model = golden["bert"]
    path = model.path / "adalora_pruned"
    return model, path, json.loads((path / CONFIG).read_text())


def load(case, path=None):
    return jl.io.load_peft(path or case[1], case[0].names, case[0].params, layout="in_out")


def expected(case):
    return safetensors_file.read(case[1] / "expected.safetensors")[0]["expected"]


def check_value(case):
    model = case[0]
    assert error(model.expected, expected(case)) > 1e-3
    out = jl.lift(model.fn)(model.params, load(case), *model.args)
    assert error(out, expected(case)) <= 1e-5


def test_it_computes_what_peft_computes(case):
    check_value(case)


def test_directions_lie_where_they_were(case):
    adapter = load(case)
    got = np.asarray(adapter.trainable[QUERY]["e"])
    masks = [
        case[2]["rank_pattern"][f"encoder.layer.{i}.attention.self.query.lora_E"] for i in range(3)
    ]
    np.testing.assert_array_equal(got != 0, masks)
    assert 0 < np.sum(masks) < 12
    scale = np.float32(6) / (np.float32(4) + np.float32(1e-5))
    np.testing.assert_array_equal(adapter.frozen[QUERY]["scale"], np.full(3, scale))


def test_it_goes_back_bitwise(case, tmp_path):
    adapter = load(case)
    jl.io.save_peft(tmp_path, adapter, case[0].names)
    assert (tmp_path / WEIGHTS).read_bytes() == (case[1] / WEIGHTS).read_bytes()
    told = json.loads((tmp_path / CONFIG).read_text())
    for name in ("rank_pattern", "init_r", "lora_alpha"):
        assert told[name] == case[2][name]
    chex.assert_trees_all_equal(adapter, load(case, tmp_path))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.update({"x.lora_E": [True]}), r"no tensors of \['x.lora_E'\]"),
        (lambda m: m.update({k: [True] * 4 for k in m}), "expected"),
        (lambda m: m.update({k: [True] for k in m}), "has 1 directions, expected init_r = 4"),
        (lambda m: m.update({k: [1, 0, 0, 0] for k in m}), "want booleans"),
        (lambda m: m.update(dict.fromkeys(m, 2)), "want booleans"),
    ],
)
def test_masks_that_do_not_fit_are_refused(case, tmp_path, change, why):
    path = shutil.copytree(case[1], tmp_path / "edited")
    config = json.loads((path / CONFIG).read_text())
    change(config["rank_pattern"])
    (path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FormatError, match=why):
        load(case, path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_real_peft_reads_what_we_write(case, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = case[0]
    jl.io.save_peft(tmp_path, load(case), model.names)
    base = transformers.BertModel.from_pretrained(model.path / "base")
    module = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    state, _ = safetensors_file.read(model.path / "base.safetensors")
    inputs = {k: torch.from_numpy(state[k]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert error(module(**inputs)[0].numpy(), expected(case)) <= 1e-5


def test_mutation_a_scale_of_the_rank_that_is_left_is_seen(case, monkeypatch):
    good = peft_lora._ada_scale
    monkeypatch.setattr(peft_lora, "_ada_scale", lambda alpha, rank: 2 * good(alpha, rank))
    with pytest.raises(AssertionError):
        check_value(case)


def adapter_of(rank, alpha, scale=None):
    """One random site."""
    site = jl.Site("q", (5, 4), "io", np.dtype("float32"), ("dot",))
    fresh, frozen = jl.AdaLoRA(rank, alpha).init(
        jax.random.key(0), site, None
    )  # no context is read
    frozen = frozen if scale is None else {"scale": jnp.asarray(scale, jnp.float32)}
    own = {**fresh, "e": jnp.linspace(0.5, 2, rank)}
    return jl.Adapter({"q": own}, {"q": frozen}, ((site, jl.AdaLoRA(rank, alpha)),))


def test_fresh_adapters_of_any_rank_are_written_and_have_pefts_scale(tmp_path):
    """At rank 8 a scale of float64 arithmetic is no float32 that PEFT's arithmetic gives."""
    names = jl.io.NameMap({"q": "q_proj"})
    for rank in (*range(1, 33), 64, 100):
        for alpha in (1.0, 8.0, 16.0, 32.5):
            own = adapter_of(rank, alpha)
            jl.io.save_peft(tmp_path / "a", own, names)
            config = json.loads((tmp_path / "a" / CONFIG).read_text())
            assert config["lora_alpha"] == alpha and config["init_r"] == rank
            want = torch.tensor(alpha) / (torch.tensor(float(rank)) + 1e-5)
            assert float(own.frozen["q"]["scale"]) == float(want)
            back = jl.io.load_peft(tmp_path / "a", names, {"q": jnp.zeros((5, 4))})
            chex.assert_trees_all_equal(back.trainable, own.trainable)


def test_a_scale_between_those_of_two_alphas_keeps_the_function(tmp_path):
    """As IncreLoRA's are, which it multiplies; a scale of 0 is none that PEFT can say."""
    names, between = jl.io.NameMap({"q": "q_proj"}), 0
    for k in range(40):
        scale = np.float32(1.3) + k * np.spacing(np.float32(1.3))
        own = adapter_of(7, 16.0, scale)
        jl.io.save_peft(tmp_path / "a", own, names)
        back = jl.io.load_peft(tmp_path / "a", names, {"q": jnp.zeros((5, 4))})
        between += float(back.frozen["q"]["scale"]) != float(scale)
        want, got = (jl.delta({"q": jnp.zeros((5, 4))}, one)["q"] for one in (own, back))
        np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-9)
    assert between  # else the test says nothing
    with pytest.raises(FormatError, match=r"no alpha gives the scale 0\.0"):
        jl.io.save_peft(tmp_path / "a", adapter_of(7, 16.0, 0.0), names)

"""Files of mergekit through the command: its own results, by the real mergekit 0.1.5.

`third_party/mergekit` has tiny models, configurations and what mergekit made of them; the script
there said is run again where mergekit is installed. Randomised methods take the same masks: they
are then compared exactly, as the others are.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.cli.merge import mergekit, sparsify
from jlora.io import safetensors_file

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "third_party/mergekit"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
# one unit in the last place
HALF = {"linear_bfloat16": 2**-7, "moved_fewer": 0, "task_float16": 2**-10}


class Masks:
    """Those of tests/golden/make_mergekit.py."""

    def __init__(self, models):
        self.models, self.calls = models, 0

    def __call__(self, rng, p):
        u = np.random.default_rng([self.calls % self.models, p.size]).random(p.size, np.float32)
        self.calls += 1
        return u.reshape(p.shape) < p


@pytest.fixture
def job(tmp_path):
    """job(data, *flags) runs a configuration alongside the models; returns (status, target)."""
    for folder in (GOLDEN / "models").iterdir():
        (tmp_path / folder.name).symlink_to(folder)

    def run(data, *flags):
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        argv = ["--config", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "out"), *flags]
        return command.main(argv), tmp_path / "out"

    return run


def tensors(path):
    return safetensors_file.read(path)[0]


def compared(out, name):
    """The largest difference of a merge from mergekit's, relative to the largest change."""
    got, want = tensors(out / "model.safetensors"), tensors(GOLDEN / f"results/{name}.safetensors")
    assert got.keys() == want.keys()
    gap = 0.0
    for key, w in want.items():
        assert got[key].dtype == w.dtype and got[key].shape == w.shape, key
        g, w = (np.asarray(t, np.float64) for t in (got[key], w))
        gap = max(gap, np.abs(g - w).max() / np.abs(w).max())
    return gap


@pytest.mark.parametrize("name", CONFIGS)
def test_the_result_is_mergekits(name, job, monkeypatch):
    """A copied file, unedited: the same tensors to rounding, of every method and every form."""
    monkeypatch.setattr(sparsify, "bernoulli", Masks(len(CONFIGS[name].get("models", ()))))
    status, out = job(CONFIGS[name])
    assert status == 0
    limit = HALF.get(name, 1e-6)
    assert compared(out, name) <= limit


def test_every_method_of_mergekit_is_among_them():
    assert {c["merge_method"] for c in CONFIGS.values()} == set(mergekit.METHODS)


CHANGED = {
    "ties": {"parameters": {"normalize": False}},
    "ties_sum": {"parameters": {"normalize": True}},
    "sce": {"parameters": {"select_topk": 0.4}},
    "task_arithmetic": {"parameters": {"lambda": 0.7}},
    "slerp_models": {"parameters": {"t": 0.31}},
    "karcher_base": {"base_model": None},
    "breadcrumbs_ties": {"parameters": {"normalize": False}},
    "nuslerp": {"parameters": {"nuslerp_flatten": False}},
}


@pytest.mark.parametrize("name", CHANGED)
def test_mutation_another_parameter_is_seen(name, job):
    data = {k: v for k, v in {**CONFIGS[name], **CHANGED[name]}.items() if v is not None}
    status, out = job(data)
    assert status == 0 and compared(out, name) > 1e-4


@pytest.mark.filterwarnings("ignore")  # its own, of NumPy and transformers
def test_the_golden_files_are_mergekits():
    """Where mergekit is installed: its results now are those that were written."""
    pytest.importorskip("mergekit")
    spec = importlib.util.spec_from_file_location("make", ROOT / "tests/golden/make_mergekit.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert json.loads(json.dumps(make.CONFIGS)) == CONFIGS
    for name in ("ties", "dare_ties", "slerp", "lora_ties"):
        for key, want in make.result(name, GOLDEN / "models").items():
            got = tensors(GOLDEN / f"results/{name}.safetensors")[key]
            np.testing.assert_allclose(got, want.numpy(), atol=1e-6)


def test_ids_of_the_hub_are_looked_up_in_its_cache(job, tmp_path, monkeypatch):
    """As `huggingface_hub` lays them out; nothing is downloaded."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in "ab":
        place = tmp_path / f"hub/models--some-one--model_{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("1" * 40)
        shutil.copytree(GOLDEN / f"models/{name}", place / "snapshots" / ("1" * 40))
    data = json.loads(json.dumps(CONFIGS["slerp"]).replace('"a"', '"some-one/model_a"')
                      .replace('"b"', '"some-one/model_b"'))  # fmt: skip
    status, out = job(data)
    assert status == 0 and compared(out, "slerp") <= 1e-6
    assert job({**data, "base_model": "some-one/model_c"}, "--overwrite")[0] == 2

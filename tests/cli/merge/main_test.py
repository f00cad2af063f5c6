"""The command on PEFT's own files: results by numpy, every format, nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jlora as jl
from jlora.cli.merge import main as command
from jlora.cli.merge import write
from jlora.cli.merge.base import INDEX, MARKER, Base
from jlora.cli.merge.config import PLAIN
from jlora.io import safetensors_file

GOLDEN = Path(__file__).parents[3] / "third_party/peft/llama"
MODULES = [f"model.layers.{i}.self_attn.{k}_proj" for i in range(3) for k in "qv"]


@pytest.fixture
def job(tmp_path):
    """job(**changes) writes a configuration and runs it; returns (status, target)."""

    def run(*flags, models=("lora", "lora_rslora"), weights=(0.5, 0.25), out=None, **changes):
        config = {
            "merge_method": "concat",
            "models": [
                {"model": str(GOLDEN / m) if isinstance(m, str) else str(m),
                 "parameters": {"weight": w}}
                for m, w in zip(models, weights, strict=True)
            ],
            "out": {"path": "out", **(out or {})},
            **changes,
        }  # fmt: skip
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
        return command.main(["--config", str(tmp_path / "merge.yaml"), *flags]), tmp_path / "out"

    return run


def delta(folder, module):
    """What a LoRA directory adds to a torch weight [out, in], by numpy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, _ = safetensors_file.read(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{k}.weight"].astype(float) for k in "AB")
    rank = a.shape[0]
    alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
    return alpha / (np.sqrt(rank) if config["use_rslora"] else rank) * b @ a


def check_sum(got, weights, models=("lora", "lora_rslora")):
    for module in MODULES:
        w = weights(module) if callable(weights) else weights
        want = sum(c * delta(GOLDEN / m, module) for c, m in zip(w, models, strict=True))
        np.testing.assert_allclose(got(module), want, atol=1e-5)


@pytest.fixture
def sharded(tmp_path):
    """The base in three shards and an index, with a tokenizer and a pickle alongside them."""
    tensors, meta = safetensors_file.read(GOLDEN / "base/model.safetensors")
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(GOLDEN / "base/config.json", folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_text("pickle")
    names, where = sorted(tensors), {}
    for k in range(3):
        file = f"model-{k + 1:05d}-of-00003.safetensors"
        part = {n: tensors[n] for n in names[k::3]}
        safetensors_file.write(folder / file, part, meta)
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_peft_from_peft(job, capsys):
    """rsLoRA's scale is not lost, ranks may differ, no base is needed."""
    status, out = job()
    assert status == 0 and "concat" in capsys.readouterr().out
    check_sum(lambda m: delta(out, m), (0.5, 0.25))
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        MARKER,
        "merge.json",
    ]


def test_mutation_other_weights_are_seen(job):
    _, out = job()
    with pytest.raises(AssertionError):
        check_sum(lambda m: delta(out, m), (0.5, 0.26))


def test_filters_gradients_and_normalisation(job):
    weights = [[{"filter": "q_proj", "value": [0.0, 1.0]}, {"value": 0.5}], 1.0]
    status, out = job(weights=weights)
    assert status == 0

    def at(module):
        return (int(module.split(".")[2]) / 2 if "q_proj" in module else 0.5, 1.0)

    check_sum(lambda m: delta(out, m), at)
    status, out = job("--overwrite", weights=weights, parameters={"normalize": True})
    check_sum(lambda m: delta(out, m), lambda m: np.array(at(m)) / sum(at(m)))


def test_a_filter_that_matches_nothing_is_one_error(job, capsys):
    weights = [[{"filter": "layers.(0|1)", "value": 1.0}, {"value": 0.5}], 1.0]
    status, out = job(weights=weights)
    assert status != 0 and not out.exists()
    told = capsys.readouterr().err
    assert "models[0].parameters.weight: the filter 'layers.(0|1)' is part of no site" in told


def test_rank_and_dtype_of_the_result(job):
    _, out = job(out={"rank": 2, "dtype": "bfloat16"})
    tensors, _ = safetensors_file.read(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {jnp.dtype("bfloat16")}
    for module in MODULES:
        x, s, y = np.linalg.svd(0.5 * delta(GOLDEN / "lora", module)
                                + 0.25 * delta(GOLDEN / "lora_rslora", module))  # fmt: skip
        want = (x[:, :2] * s[:2]) @ y[:2]
        np.testing.assert_allclose(delta(out, module), want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merged_weights_shard_by_shard(dtype, job, sharded):
    status, out = job(base_model=str(sharded), out={"format": "merged", "dtype": dtype})
    assert status == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [MARKER, "merge.json", *(p.name for p in sharded.iterdir() if p.suffix != ".bin")]
    )
    before, after = Base(sharded), Base(out)
    for name in before.where:
        old, new = (next(t[name] for _, t, _ in b.shards() if name in t) for b in (before, after))
        want = old.astype(np.float64)
        module = name.removesuffix(".weight")
        if module in MODULES:
            want = want + sum(
                c * delta(GOLDEN / m, module) for c, m in ((0.5, "lora"), (0.25, "lora_rslora"))
            )
        else:
            want = want.astype(new.dtype)
        atol = 1e-6 if dtype is None else 4e-3 * np.abs(want.astype(float)).max()
        np.testing.assert_allclose(new.astype(float), want.astype(float), atol=atol)
        assert new.dtype == (old.dtype if dtype is None else jnp.dtype("bfloat16"))


def test_types_whose_delta_needs_the_base(job):
    """LoRA, LoHa, LoKr, DoRA, OFT, IA3 in one merge: against merging each by the library."""
    base = Base(GOLDEN / "base")
    kinds = ("lora", "loha", "lokr", "dora", "oft", "ia3")
    weights = (0.3, 0.15, 0.2, 0.2, 0.2, 0.1)
    status, out = job(models=kinds, weights=weights, base_model=str(GOLDEN / "base"),
                      missing="zero")  # fmt: skip
    assert status == 0
    total = {}
    for w, kind in zip(weights, kinds, strict=True):
        a = jl.io.load_peft(GOLDEN / kind, PLAIN, base.params())
        params = {s.path: jnp.asarray(base.kernel(s, PLAIN)) for s, _ in a.sites}
        for path, d in jl.delta(params, a).items():
            total[path] = total.get(path, 0) + w * np.asarray(d, np.float64)
    for path, want in total.items():
        module = path.removesuffix("/kernel")
        np.testing.assert_allclose(delta(out, module).T, want, atol=1e-5)


def test_orbax_both_ways_and_names(job, tmp_path):
    """A stacked JAX adapter with a PEFT one, through the name map; out as Orbax and as PEFT."""
    peft = jl.io.load_peft(GOLDEN / "lora", jl.io.llama(), llama_sites())
    jl.io.save_adapter(tmp_path / "stacked", peft)
    status, out = job(models=(tmp_path / "stacked", "lora_rslora"), names="llama",
                      weights=([1.0, 0.0], 0.25))  # fmt: skip
    assert status == 0
    check_sum(lambda m: delta(out, m), lambda m: (1 - int(m.split(".")[2]) / 2, 0.25))
    status, out = job("--overwrite", models=(tmp_path / "stacked",), weights=(2.0,), names="llama",
                      out={"format": "orbax"})  # fmt: skip
    assert status == 0
    back = jl.io.restore_adapter(out)
    for path, d in jl.algebra.deltas(back).items():
        want = jl.algebra.deltas(peft)[path]
        np.testing.assert_allclose(d[0] @ d[1], 2 * (want[0] @ want[1]), atol=1e-5)


def llama_sites():
    shapes = {"query": (3, 16, 16), "value": (3, 16, 8)}
    return [
        jl.Site(f"layers/attention/{k}/kernel", s, "sio", jnp.dtype("float32"), ("dot",))
        for k, s in shapes.items()
    ]


def test_randomised_methods_depend_on_the_seed_alone(job):
    seen = []
    for seed in (0, 0, 1):
        _, out = job("--overwrite", merge_method="dare_linear", seed=seed,
                     parameters={"density": 0.5, "rank": 4})  # fmt: skip
        seen.append(np.stack([delta(out, m)[:8] for m in MODULES]))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.allclose(seen[0], seen[2])


def test_dry_run_writes_nothing(job, capsys):
    status, out = job("--dry_run", merge_method="truncated", parameters={"rank": 2},
                      base_model=str(GOLDEN / "base"), out={"format": "merged"})  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0 and not out.exists()
    for words in ("truncated", "sites         6 (6 matrices)", "rank=2", "peak memory",
                  "largest shard", "weight 0.25"):  # fmt: skip
        assert words in text, words


REFUSED = {
    "method": ({"merge_method": "tie"}, "expected one of"),
    "number": ({"merge_method": "slerp", "models": ["lora"], "weights": [1.0]}, "slerp takes 2"),
    "option": ({"parameters": {"densty": 0.5}}, "densty"),
    "no adapter": ({"models": ["lora", Path("/nothing")]}, "/nothing is no directory"),
    "base needed": ({"models": ["lora", "dora"]}, "base"),
    "no base": ({"out": {"format": "merged"}}, "base_model: lacks"),
    "bad base": ({"base_model": "/nothing"}, "no such directory"),
    "sites": ({"models": ["lora", "lora_all"]}, "expected the sites of all adapters"),
    "a value within": (
        {"parameters": {"normalize": 3}},
        "parameters.normalize: got 3, expected true or false",
    ),
    "sum zero": ({"weights": (1.0, -1.0), "parameters": {"normalize": True}}, "sum to 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_write_nothing(name, job, capsys):
    changes, text = REFUSED[name]
    status, out = job(**changes)
    assert status == 2 and text in capsys.readouterr().err
    assert not out.exists() and not list(out.parent.glob(".*"))


@pytest.mark.parametrize("base", [None, str(GOLDEN / "base")])
def test_an_adapter_of_no_matrices_is_refused_by_what_it_is(base, job, tmp_path, capsys):
    """Not "a base is needed", which led nowhere."""
    norms = tmp_path / "norms"
    norms.mkdir()
    (norms / "adapter_config.json").write_text('{"peft_type": "LN_TUNING", "target_modules": []}')
    for model, words in (
        (GOLDEN.parent / "bert/prompt", "it adds tokens or a cache"),
        (norms, "whole vectors of norms"),
    ):
        status, out = job(models=(model, "lora"), **({"base_model": base} if base else {}))
        told = capsys.readouterr().err
        assert status == 2 and words in told and "base is needed" not in told
        assert len(told.strip().splitlines()) == 1 and not out.exists()


def test_what_exists_is_kept(job, capsys):
    _, out = job()
    (out / "mine").write_text("x")
    assert job()[0] == 2 and (out / "mine").exists()
    assert "--overwrite" in capsys.readouterr().err
    assert job("--overwrite")[0] == 2 and (out / "mine").exists()
    assert "did not write: ['mine']" in capsys.readouterr().err
    (out / "mine").unlink()
    assert job("--overwrite")[0] == 0


def test_what_a_killed_run_left_is_removed(job, tmp_path):
    (tmp_path / ".out.partial/new").mkdir(parents=True)
    status, out = job()
    assert status == 0 and not list(out.parent.glob(".*"))


KILLED = """
import os, signal, sys
from jlora.cli.merge import main, write
real, calls = write.safetensors_file.write, []

def second(*args, **options):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args, **options)

write.safetensors_file.write = second
main.main(["--config", sys.argv[1], "--overwrite"])
"""


def test_kill_9_leaves_the_target_as_it_was(job, sharded, tmp_path):
    """Killed at its second shard of three; the next run ends as if nothing had happened."""
    job()
    job("--dry_run", "--overwrite", base_model=str(sharded), out={"format": "merged"})
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "merge.yaml")],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert run.returncode == -9, run.stderr
    assert (tmp_path / ".out.partial/new").is_dir()
    check_sum(lambda m: delta(tmp_path / "out", m), (0.5, 0.25))
    status, out = job("--overwrite", base_model=str(sharded), out={"format": "merged"})
    assert status == 0 and not list(tmp_path.glob(".*"))
    assert len(list(out.glob("*.safetensors"))) == 3


def test_what_a_killed_run_moved_away_is_put_back(job, tmp_path, capsys):
    """Killed between the two renames: the old result is there again, and still protected."""
    _, out = job()
    (tmp_path / ".out.partial").mkdir()
    os.replace(out, tmp_path / ".out.partial/old")
    assert job()[0] == 2 and "--overwrite" in capsys.readouterr().err
    check_sum(lambda m: delta(out, m), (0.5, 0.25))


def test_the_configuration_of_the_readme_runs(tmp_path, capsys):
    """On folders of those names: plan, then result against numpy. Sites are 8 wide at most."""
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (text,) = re.findall(r"<!-- merge config -->\n```yaml\n(.*?)```", readme, re.S)
    assert text.count("rank: 16") == 1
    (tmp_path / "merge.yaml").write_text(text.replace("rank: 16", "rank: 8"))
    places = {"adapters/math": "lora", "adapters/code": "lora_rslora", "models/base": "base"}
    for place, golden in places.items():
        shutil.copytree(GOLDEN / golden, tmp_path / place)
    argv = ["--config", str(tmp_path / "merge.yaml")]
    assert command.main([*argv, "--dry_run"]) == 0 and not (tmp_path / "merged").exists()
    assert "peak memory" in capsys.readouterr().out
    assert command.main(argv) == 0
    code = {0: 0.1, 1: 0.5, 2: 0.9}  # a gradient over the layers
    check_sum(lambda m: delta(tmp_path / "merged", m), lambda m: (0.6, code[int(m.split(".")[2])]))


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), SystemExit(143)])
def test_interrupted_writing_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), write.whole(tmp_path / "out", False) as new:
        new.mkdir()
        (new / "x").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing_half_written(overwrite, job, sharded, monkeypatch):
    """The second shard cannot be written: the target is as it was, and nothing is alongside it."""
    flags = ("--overwrite",) if overwrite else ()
    if overwrite:
        job()
    calls = []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left")
        real(*args, **options)

    real = safetensors_file.write
    monkeypatch.setattr(write.safetensors_file, "write", fail)
    status, out = job(*flags, base_model=str(sharded), out={"format": "merged"})
    assert status == 2 and len(calls) == 2
    assert not list(out.parent.glob(".*"))
    assert out.exists() == overwrite
    if overwrite:
        check_sum(lambda m: delta(out, m), (0.5, 0.25))


def test_as_a_module_and_the_name_stays_the_function(tmp_path):
    """`python -m jlora.merge` runs; `jl.merge` is the function, also after `import jlora.merge`."""
    code = "import jlora as jl; f = jl.merge; import jlora.merge; assert jlora.merge is f"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    run = subprocess.run(
        [sys.executable, "-m", "jlora.merge", "--config", str(tmp_path / "no.yaml")],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert run.returncode == 2 and "error:" in run.stderr and "no.yaml" in run.stderr

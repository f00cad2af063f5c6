"""Merges of full checkpoints: what is refused, said and written; its values are mergekit_test's."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jlora.cli.merge import main as command
from jlora.cli.merge import mergekit, whole
from jlora.io import safetensors_file

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "third_party/mergekit/models"
TWO = [{"model": "a"}, {"model": "b"}]
HEAD = "lm_head.weight"


@pytest.fixture
def job(tmp_path):
    """job(edit, **data) runs a configuration on copies of the models that `edit` has changed."""
    for name in ("a", "b", "base", "lora_a"):
        shutil.copytree(MODELS / name, tmp_path / name)

    def run(*flags, edit=None, models=TWO, method="linear", **data):
        if edit is not None:
            edit(tmp_path)
        data = {"merge_method": method, **({"models": models} if models else {}), **data}
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(data))
        argv = ["--config", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "out"), *flags]
        return command.main(argv), tmp_path / "out"

    return run


def tensors(folder):
    return safetensors_file.read(folder / "model.safetensors")[0]


def rewritten(name, change):
    """An edit: the tensors of a model changed by a function."""

    def edit(folder):
        path = folder / name / "model.safetensors"
        safetensors_file.write(path, change(safetensors_file.read(path)[0]), {"format": "pt"})

    return edit


def vocabulary(folder):
    path = folder / "b/tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"another"'))


def with_ids(value):
    def edit(folder):
        for name in "ab":
            ids = np.arange(3, dtype=np.int64) + (value if name == "b" else 0)
            rewritten(name, lambda t, ids=ids: t | {"ids": ids})(folder)

    return edit


HALF = {"models": [{"model": m, "parameters": {"weight": 0.5}} for m in "ab"]}
MOVED = [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]
REFUSED = {
    "shape": (
        {"edit": rewritten("b", lambda t: t | {HEAD: np.zeros((17, 8), np.float32)})},
        "lm_head.weight: got (17, 8), expected (16, 8)",
    ),
    "lacks": (
        {"edit": rewritten("b", lambda t: {k: v for k, v in t.items() if "norm" not in k})},
        "has no model.layers.0.input_layernorm.weight",
    ),
    "extra": ({"edit": rewritten("b", lambda t: t | {"x": t[HEAD]})}, "has ['x'], which"),
    "dtypes": (
        {"edit": rewritten("b", lambda t: {k: v.astype(jnp.bfloat16) for k, v in t.items()})},
        "got bfloat16, expected float32 of",
    ),
    "integers": ({"edit": with_ids(1)}, "ids: got int64 numbers that are not those"),
    "tokenizers": (
        {"edit": vocabulary, "tokenizer_source": "union"},
        "b/tokenizer.json has another vocabulary than",
    ),
    "tokens": ({"tokenizer": {"source": "base", "tokens": {}}}, "tokenizer: got key 'tokens'"),
    "both": ({"slices": MOVED}, "models, slices: got both"),
    "no base": ({"method": "ties"}, "base_model: lacks; ties of these models needs one"),
    "too many": ({"method": "slerp", "base_model": "base", "parameters": {"t": 0.5}},
                 "models: slerp takes 1 besides the base, got 2"),
    "too few": ({"method": "model_stock", "base_model": "base", "models": TWO[:1]},
                "models: model_stock takes 2 or more besides the base, got 1"),
    "needed": ({"method": "slerp", "base_model": "a"}, "parameters.t: lacks; slerp needs it"),
    "for adapters": ({"method": "knots"}, "knots merges adapters; of full checkpoints"),
    "format": ({"out": {"format": "peft"}}, "out.format: got peft, expected merged"),
    "rank": ({"out": {"rank": 4}}, "out.rank: got 4, expected none"),
    "filter": ({"parameters": {"weight": [{"filter": "qproj", "value": 1}, {"value": 2}]}},
               "the filter 'qproj' is part of no site's name"),
    "base of linear": ({**HALF, "base_model": "base"}, "expected it in models, or no base_model"),
    "other base": ({"models": [{"model": "a+lora_a"}], "base_model": "base", "method": "ties"},
                   "expected all adapters on one base"),
    "wide": ({"edit": rewritten("a", lambda t: {k: v.astype(float) for k, v in t.items()}),
              "models": TWO[:1], "method": "passthrough"}, "say so by dtype: float32"),
    "sum": ({"models": [{"model": m, "parameters": {"weight": w}} for m, w in zip("ab", (1, -1),
             strict=True)]}, "they sum to 0"),
    "density": ({"method": "ties", "base_model": "base", "parameters": {"density": -0.5}},
                "parameters.density: got -0.5, expected a number in (0, 1]"),
    "density above 1": ({"method": "dare_ties", "base_model": "base", "parameters":
                         {"density": 1.5}}, "density: got 1.5, expected a number in (0, 1]"),
    "select_topk": ({"method": "sce", "base_model": "base", "parameters": {"select_topk": 0}},
                    "select_topk: got 0, expected a number in (0, 1]"),
    "gamma": ({"method": "breadcrumbs", "base_model": "base", "parameters": {"gamma": 1}},
              "gamma: got 1, expected a number in [0, 1)"),
    "infinite": ({"method": "task_arithmetic", "base_model": "base", "parameters":
                  {"lambda": float("inf")}}, "parameters.lambda: got inf, expected"),
    "steps": ({"method": "karcher", "parameters": {"max_iter": 0}},
              "max_iter: got 0, expected a number in [1, inf)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_write_nothing(name, job, capsys):
    changes, text = REFUSED[name]
    status, out = job(**changes)
    told = capsys.readouterr().err
    assert status == 2 and text in told, told
    assert not out.exists() and not list(out.parent.glob(".*"))


def test_equal_integers_are_kept_and_weights_of_none_are_the_mean(job):
    status, out = job(edit=with_ids(0))
    assert status == 0
    got, a, b = (tensors(out.parent / m) for m in ("out", "a", "b"))
    np.testing.assert_array_equal(got["ids"], [0, 1, 2])
    np.testing.assert_allclose(got[HEAD], (a[HEAD] + b[HEAD]) / 2, atol=1e-6)


def test_the_configuration_says_the_dtype_of_the_weights(job):
    status, out = job(dtype="bfloat16")
    assert status == 0 and {t.dtype for t in tensors(out).values()} == {jnp.dtype("bfloat16")}
    data = json.loads((out / "config.json").read_text())
    assert data["dtype"] == "bfloat16" and data["num_hidden_layers"] == 3


def test_a_tied_head_is_the_table(job):
    """A model without a head of its own: mergekit reads the table in its place."""
    edit = rewritten("b", lambda t: {k: v for k, v in t.items() if k != HEAD})
    status, out = job(edit=edit, parameters={"weight": 0.5})
    assert status == 0
    a, b = tensors(out.parent / "a")[HEAD], tensors(out.parent / "b")["model.embed_tokens.weight"]
    np.testing.assert_allclose(tensors(out)[HEAD], (a + b) / 2, atol=1e-6)


def test_checkpoints_and_adapters_together(job):
    """Differences of both kinds from one base, in one sum."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("b", 0.5), ("lora_a", 2.0))]
    status, out = job(method="task_arithmetic", models=models, base_model="base")
    assert status == 0
    alone = [{"model": "lora_a", "parameters": {"weight": 2.0}}]
    again, _ = job("--overwrite", method="concat", models=alone, base_model="base",
                   out={"format": "merged"})  # fmt: skip
    assert again == 0
    adapter, base, b = (tensors(out.parent / m) for m in ("out", "base", "b"))
    status, out = job("--overwrite", method="task_arithmetic", models=models, base_model="base")
    got = tensors(out)
    for name, old in base.items():
        want = old + 0.5 * (b[name] - old) + (adapter[name] - old)
        np.testing.assert_allclose(got[name], want, atol=2e-6)


def test_the_dry_run_says_defaults_and_memory(job, capsys):
    parameters = {"weight": 0.5}
    status, out = job("--dry_run", method="ties", base_model="base", parameters=parameters)
    told = capsys.readouterr().out
    assert status == 0 and not out.exists()
    for words in ("ties (mergekit's), of differences from the base", "model 0", "a (checkpoint)",
                  "tensors       30 of 30 are merged", "density=(1, 1)", "normalize=True",
                  "lambda=1", "no rank is cut", "peak memory"):  # fmt: skip
        assert words in told, words


def test_what_was_merged_is_beside_the_result(job):
    status, out = job(method="sce", base_model="base")
    data = json.loads((out / "merge.json").read_text())
    assert status == 0 and data["merge_method"] == "sce"
    assert data["parameters"][0]["parameters"] == {"int8_mask": False, "select_topk": 1.0}


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_drops_have_the_mean_of_what_they_drop(method, job):
    """Over 40 seeds, within five standard errors; equal seeds draw equal masks."""
    options = {"density": 0.5, "weight": 1.0, "rescale": False}
    models = [{"model": "a", "parameters": {"density": 0.5, "weight": 1.0}}]
    seen = []
    for seed in (*range(40), 0):
        status, out = job("--overwrite", method=method, models=models, base_model="base",
                          parameters={"rescale": False}, seed=seed)  # fmt: skip
        assert status == 0
        base = tensors(out.parent / "base")
        seen.append(tensors(out)[HEAD] - base[HEAD])
    np.testing.assert_array_equal(seen[0], seen[-1])
    d = tensors(out.parent / "a")[HEAD] - base[HEAD]
    kept = np.mean([np.abs(s) > 1e-7 for s in seen[:-1]], axis=0)[np.abs(d) > 1e-6]
    assert options["density"] - 0.05 < kept.mean() < options["density"] + 0.05


def test_the_page_names_every_method_and_parameter():
    """docs/merging.md: a row for each method of mergekit, with what is its own and the default."""
    page = (ROOT / "docs/merging.md").read_text().splitlines()
    for method in mergekit.METHODS.values():
        (row,) = (r for r in page if r.startswith("|") and f"`{method.name}`" in r.split("|")[1])
        family = method.function is whole.task_vectors and method.name != "task_arithmetic"
        for key, parameter in method.parameters.items():
            default = str(parameter.default).lower().removesuffix(".0").replace("e-0", "e-")
            said = f"`{key}: {default}`" if isinstance(parameter.default, bool | float) else key
            if key not in ("int8_mask", "vote") and not (family and key in ("weight", "lambda")):
                assert said in row or f"(`{method.name}`: `{default}`)" in row, (method.name, key)

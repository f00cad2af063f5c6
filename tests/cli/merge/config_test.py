"""The configuration: parsed, resolved for each site, refused with the key, got and expected."""

import re
from pathlib import Path

import pytest
import yaml

from jlora.cli.merge.config import parse
from jlora.cli.merge.values import ConfigError, check_filters, layer_of, resolve
from jlora.merging import METHODS

SMALL = {"merge_method": "concat", "models": [{"model": "a"}, {"model": "/b"}]}


def test_defaults_and_relative_paths():
    config = parse(SMALL, Path("/here"))
    assert [str(m.path) for m in config.models] == ["/here/a", "/b"]
    assert (config.base, config.seed, config.missing) == (None, 0, "error")
    assert (config.out.path, config.out.format, config.out.rank) == (None, None, None)
    assert config.names.module("model.layers.3.q/kernel") == "model.layers.3.q"


def test_the_example_of_the_readme():
    readme = Path(__file__).parents[3] / "README.md"
    (text,) = re.findall(r"<!-- merge config -->\n```yaml\n(.*?)```", readme.read_text(), re.S)
    config = parse(yaml.safe_load(text))
    assert config.method in METHODS and len(config.models) == 2
    weight = config.models[1].parameters["weight"]
    assert resolve(weight, "weight", "layers.3.self_attn.q/kernel", 0.5) == 0.5
    assert resolve(weight, "weight", "layers.3.mlp.up/kernel", 0.5) == 0.4


def test_names_and_prefix():
    config = parse({**SMALL, "names": "bert", "prefix": "bert."})
    path = "layers/attention/query/kernel"
    assert config.names.module(path, (2,)) == "bert.encoder.layer.2.attention.self.query"
    own = parse({**SMALL, "names": {r"(\w+)/kernel": r"net.\1"}})
    assert own.names.module("up/kernel") == "net.up"
    assert parse({**SMALL, "prefix": "x."}).names.module("y/kernel") == "x.y"


@pytest.mark.parametrize(
    "path, layer",
    [("model.layers.11.mlp.up_proj", 11), ("layers_3/q/kernel", 3), ("h/2/w", 2), ("pooler", None),
     ("conv2d.kernel", None)],
)  # fmt: skip
def test_layers(path, layer):
    assert layer_of(path) == layer


@pytest.mark.parametrize(
    "value, path, place, want",
    [
        (0.5, "a", None, 0.5),
        ([0.0, 1.0], "a", 0.25, 0.25),
        ([0.0, 1.0, 0.0], "a", 0.75, 0.5),
        ([0.3], "a", 0.9, 0.3),
        ([{"filter": "q", "value": 1}, {"value": 2}], "l.q", None, 1),
        ([{"filter": "q", "value": 1}, {"value": 2}], "l.k", None, 2),
        ([{"filter": "*", "value": [1, 3]}], "l.k", 0.5, 2.0),
        ("sum", "a", None, "sum"),
    ],
)
def test_values_of_sites(value, path, place, want):
    assert resolve(value, "x", path, place) == want


BAD = {
    "no mapping": ("x", "the configuration: got 'x'"),
    "no method": ({"models": []}, "lacks 'merge_method'"),
    "unknown key": ({**SMALL, "slice": []}, "got key 'slice', expected one of"),
    "no models": ({**SMALL, "models": []}, "expected a list of at least one"),
    "model key": ({**SMALL, "models": [{"model": "a", "weight": 1}]}, r"models\[0\]: got key"),
    "path": ({**SMALL, "models": [{"model": 3}]}, r"models\[0\].model: got 3, expected text"),
    "format": ({**SMALL, "out": {"format": "gguf"}}, "out.format: got 'gguf'"),
    "dtype": ({**SMALL, "out": {"dtype": "int8"}}, "out.dtype: got 'int8'"),
    "rank": ({**SMALL, "out": {"rank": 0}}, "out.rank: got 0"),
    "seed": ({**SMALL, "seed": -1}, "seed: got -1"),
    "missing": ({**SMALL, "missing": "skip"}, "missing: got 'skip'"),
    "names": ({**SMALL, "names": "gpt"}, "names: got 'gpt'"),
    "parameters": ({**SMALL, "parameters": [1]}, r"parameters: got \[1\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    data, text = BAD[name]
    with pytest.raises(ConfigError, match=text):
        parse(data)


@pytest.mark.parametrize(
    "value, text",
    [
        ([{"filter": "k", "value": 1}], "no filter matches the site l.q"),
        ([1.0, 2.0], "a gradient, but l.q has no layer"),
        ([1.0, "a"], "expected numbers"),
        ([{"filter": "q", "weight": 1}], "x: lacks 'value'"),
    ],
)
def test_values_that_do_not_fit(value, text):
    with pytest.raises(ConfigError, match=text):
        resolve(value, "x", "l.q", None)


PATHS = ("l.0.q", "l.0.k", "l.1.q")


@pytest.mark.parametrize(
    "value, text",
    [
        ([{"filter": "l.*q", "value": 1}, {"value": 2}], r"'l\.\*q' is part of no site.*l\.0\.q"),
        ([{"filter": "l", "value": 1}, {"filter": "q", "value": 2}], "'q' has no site left"),
        ([{"filter": "*", "value": 1}, {"filter": "q", "value": 2}], "'q' has no site left"),
        ([{"filter": "k", "value": [{"filter": "q", "value": 1}, {"value": 2}]}], "'q' .* no site"),
    ],
)  # fmt: skip
def test_filters_that_take_no_site_are_refused(value, text):
    with pytest.raises(ConfigError, match=text):
        check_filters(value, "x", PATHS)


def test_filters_that_take_all_leave_the_last_entry_free():
    check_filters(
        [{"filter": "q", "value": 1}, {"filter": "k", "value": 2}, {"value": 3}], "x", PATHS
    )
    check_filters([0.0, 1.0], "x", PATHS)
    check_filters(3, "x", PATHS)

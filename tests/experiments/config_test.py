"""Settings: stage keys depend on what the stage reads, bad values are named."""

import dataclasses
import re
from pathlib import Path

import pytest

from experiments import config as lib
from experiments.config import STAGES, Config
from experiments.stages import base_model, tiny_base


def test_key_changes_from_its_stage_on_and_not_before():
    base = Config()
    changed = dataclasses.replace(base, sample_steps=7)
    assert [base.key(s) == changed.key(s) for s in STAGES] == [True] * 5 + [False] * 6
    assert base.key("zoo") != dataclasses.replace(base, rank=8).key("zoo")


def test_every_field_names_a_stage_and_has_a_help_text():
    for field in dataclasses.fields(Config):
        assert field.metadata["stage"] in STAGES and field.metadata["help"]


def test_every_number_has_a_range_that_its_default_and_the_flagfiles_are_in():
    for field in dataclasses.fields(Config):
        if field.type in ("int", "float"):
            assert field.metadata["range"] in lib.RANGES, field.name
            for wrong in (float("nan"), float("inf"), float("-inf"), -1):
                with pytest.raises(ValueError, match=f"^{field.name}: got .*, expected "):
                    lib.check(dataclasses.replace(Config(), **{field.name: wrong}))
    lib.check(Config())
    for path in (Path(lib.__file__).parent / "flags").glob("text_*.flags"):
        pairs = re.findall(r"^--(\w+)=(.*)$", path.read_text(encoding="utf-8"), re.M)
        kinds = {f.name: type(f.default) for f in dataclasses.fields(Config)}
        lib.check(Config(**{k: kinds[k](v) for k, v in pairs if k in kinds}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"zoo_lr": -1.0}, r"^zoo_lr: got -1\.0, expected > 0$"),
        ({"zoo_lr": float("nan")}, "^zoo_lr: got nan, expected > 0$"),
        ({"rank": 0}, "^rank: got 0, expected >= 1$"),
        ({"eval_rows": 1}, "^eval_rows: got 1, expected >= 2$"),
        ({"ema": 1.0}, r"^ema: got 1\.0, expected 0 <= x < 1$"),
        ({"tasks": "huge"}, "^tasks: got 'huge', expected one of toy, "),
        ({"base": "gpt"}, "^base: got 'gpt', expected minilm, tiny or hf:DIR$"),
        ({"head": "own"}, "^head: got 'own', expected one of anonymous, label_text$"),
        ({"width": 30}, "^width: got 30, expected a multiple of heads=4$"),
        ({"objective": "v"}, "^objective: got 'v', expected flow, "),
        ({"step_grid": "2,x"}, "^step_grid: got '2,x', expected positive integers"),
        ({"step_grid": "2,²"}, "^step_grid: got '2,²', expected positive integers"),
        ({"objective": "eps", "sampler": "ddim"}, "^task_steps: got 450, expected 0"),
        ({"sites": "("}, r"^sites: got '\(', expected a regular expression"),
    ],
)
def test_bad_values_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        lib.check(dataclasses.replace(Config(), **change))


def test_bad_folders_are_found_without_opening_a_stage(tmp_path):
    for change in ({"task_dir": "no"}, {"tasks": "glue:no"}, {"base": "hf:no"}):
        with pytest.raises(ValueError, match=r"no(', expected .*DIR with DIR| is not) a folder"):
            lib.check_folders(dataclasses.replace(Config(), **change))
    lib.check_folders(dataclasses.replace(Config(), tasks=f"glue:{tmp_path}"))


def test_what_a_base_cannot_have_is_refused_and_not_clamped():
    small = Config(base="tiny", max_length=8, layers=1, rank=1)
    base_model.check(small, tiny_base.CONFIG)
    for name, value in (("rank", 100_000), ("layers", 3), ("max_length", 65)):
        with pytest.raises(ValueError, match=f"^{name}: got {value}, expected <= .* base=tiny$"):
            base_model.check(dataclasses.replace(small, **{name: value}), tiny_base.CONFIG)

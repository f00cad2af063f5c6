"""Settings: stage keys depend on what the stage reads, bad values are named."""

import dataclasses

import pytest

from experiments import config as lib
from experiments.config import STAGES, Config


def test_key_changes_from_its_stage_on_and_not_before():
    base = Config()
    changed = dataclasses.replace(base, sample_steps=7)
    assert [base.key(s) == changed.key(s) for s in STAGES] == [True] * 4 + [False] * 3
    assert base.key("zoo") != dataclasses.replace(base, rank=8).key("zoo")


def test_every_field_names_a_stage_and_has_a_help_text():
    for field in dataclasses.fields(Config):
        assert field.metadata["stage"] in STAGES and field.metadata["help"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rank": 0}, "--rank=0: expected at least 1"),
        ({"tasks": "huge"}, "--tasks=huge"),
        ({"base": "gpt"}, "--base=gpt"),
        ({"width": 30}, "not a multiple of --heads"),
        ({"objective": "v"}, "expected --objective=flow"),
        ({"step_grid": "2,x"}, "--step_grid=2,x"),
        ({"objective": "eps", "sampler": "ddim"}, "expected --task_steps=0"),
    ],
)
def test_bad_values_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        lib.check(dataclasses.replace(Config(), **change))

"""Settings: flagfiles that work, keys of stages, and what cannot work, by name."""

import dataclasses
from pathlib import Path

import pytest
from absl import flags

from experiments import config as config_lib
from experiments.styles.settings import STAGES, Settings, check, from_flags

FLAGS = Path(config_lib.__file__).parent / "flags"
S = Settings()


@pytest.mark.parametrize("name", ["style_smoke", "style_quick", "style_full"])
def test_flagfiles_say_settings_that_work(name, monkeypatch):
    values = flags.FlagValues()
    for kind in ("bool", "integer", "float", "string", "enum"):
        real = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(
            flags, f"DEFINE_{kind}", lambda *given, real=real: real(*given, flag_values=values)
        )
    config_lib.define_flags(Settings)
    flags.DEFINE_string("workdir", "", "")
    flags.DEFINE_bool("fast_compile", False, "")
    values([name, f"--flagfile={FLAGS / name}.flags"])
    found = from_flags(values)
    assert found.preset == name.removeprefix("style_") and values.workdir == f"runs/{name}"
    assert (found.base == "tiny") == (name == "style_smoke")


def test_a_key_hashes_what_is_read_up_to_its_stage():
    for field in dataclasses.fields(Settings):
        choices = field.metadata["choices"]
        value = getattr(S, field.name)
        other = choices[0] if choices else value + (1 if not isinstance(value, str) else "x")
        changed = dataclasses.replace(S, **{field.name: other})
        first = STAGES.index(field.metadata["stage"])
        differs = [changed.key(stage) != S.key(stage) for stage in STAGES]
        assert differs == [k >= first for k in range(len(STAGES))], field.name


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("few_steps", "5,x", "positive integers"), ("shots", 999, "at most pictures"),
     ("samples", 999, "at most measured"), ("width", 6, "a multiple of 4"),
     ("sites", "(", "a regular expression"), ("rank", 0, ">= 1")],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: got .*, expected {expected}"):
        check(dataclasses.replace(S, **{name: value}))

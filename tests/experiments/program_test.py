"""Programs whose flags have the same names live in one process."""

import importlib

import pytest
from absl import app, flags

from experiments import program

NAMES = (
    *("cond_pdiff", "finetune", "pretrain", "pretrain_clip", "pretrain_generator"),
    *("pretrain_pictures", "style_pdiff", "variants"),
)  # fmt: skip
WORKDIRS = {"cond_pdiff": "runs/cond_pdiff", "finetune": "runs/finetune",
            "pretrain": "runs/base_l", "pretrain_clip": "runs/base_c",
            "pretrain_generator": "runs/minilm_generator", "pretrain_pictures": "runs/base_d",
            "style_pdiff": "runs/style_pdiff", "variants": "runs/variants"}  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    """The flags before the test, and back to them after it."""
    app.define_help_flags()
    kept, verbosity = set(flags.FLAGS), flags.FLAGS["verbosity"].value
    yield kept
    flags.FLAGS["verbosity"].value = verbosity


def test_importing_every_program_defines_no_flag(table):
    for name in NAMES:
        importlib.import_module(f"experiments.{name}")
    assert set(flags.FLAGS) == table


def test_each_program_has_its_own_flags_while_it_runs(table):
    for name in (*NAMES, NAMES[0]):
        module, seen = importlib.import_module(f"experiments.{name}"), []

        def main(words, seen=seen):
            seen.append((words, flags.FLAGS.workdir, set(flags.FLAGS) - table))

        with pytest.raises(SystemExit) as ended:
            program.run(module.define_flags, main, [name, "rest"])
        assert ended.value.code in (None, 0)
        words, workdir, own = seen[0]
        assert words == [name, "rest"] and workdir == WORKDIRS[name]
        assert ("dry_run" in own) == (
            name not in ("cond_pdiff", "pretrain_generator", "style_pdiff", "variants")
        ) and "cache" in own
        assert set(flags.FLAGS) == table


def test_flags_are_gone_after_a_program_that_fails(table):
    def define():
        flags.DEFINE_integer("how_many", 1, "a flag")

    def main(words):
        assert flags.FLAGS.how_many == 3
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        program.run(define, main, ["x", "--how_many=3"])
    assert set(flags.FLAGS) == table

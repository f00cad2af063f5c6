"""SIGKILL changes nothing: a run that was killed ends with the bits of one that was not."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.finetuning.settings import Settings
from tests.experiments import forked

pytest.importorskip("grain", reason="grain is in the extra experiments")


def words(workdir, settings, *more):
    """Of the command line."""
    default = Settings()
    given = [
        f"--{f.name}={getattr(settings, f.name)}"
        for f in dataclasses.fields(Settings)
        if getattr(settings, f.name) != getattr(default, f.name)
    ]
    return [*given, f"--workdir={workdir}", *more]


def command(environment, workdir, settings, *more, program=("experiments.finetune",)):
    """The command in a process of its own."""
    line = [sys.executable, "-m", *program, *words(workdir, settings, *more)]
    root = Path(__file__).parents[3]
    env = {**environment, "PYTHONPATH": str(root)}
    return subprocess.Popen(line, cwd=root, env=env, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(settings, quick, tmp_path):
    """SIGKILL once a checkpoint is there, then the same command again."""
    s = dataclasses.replace(settings, steps=20, save_every=2, samples=0, eval_data="")
    word = ("jlora.cli.main", "finetune")
    dry = command(quick, tmp_path / "whole", s, "--dry_run", program=word)
    said, error = dry.communicate()
    assert dry.returncode == 0, error
    assert re.search(r"parameters: 6,864 frozen, .* trained", said) and "20 steps" in said
    assert re.search(r"memory per device: [\d.]+ MiB", said)
    assert not (tmp_path / "whole").exists()
    with forked.Server(quick | {"PYTHONPATH": ""}, "experiments.finetuning.run") as server:
        killed = server.start("finetune", *words(tmp_path / "killed", s))
        while not list((tmp_path / "killed").glob("train-*/checkpoints/step-??????")):
            assert not server.ended(), server.wait()
            time.sleep(0.01)
        assert server.kill(killed).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "report.json").exists()
        reports = []
        for name in ("killed", "whole"):
            done = server.call("finetune", *words(tmp_path / name, s))
            assert done.returncode == 0, done.stderr
            reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert reports[0]["losses"] == reports[1]["losses"]
    one, two = (tmp_path / n / "peft" / "adapter_model.safetensors" for n in ("killed", "whole"))
    assert one.read_bytes() == two.read_bytes()

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

pytest.importorskip("grain", reason="grain is in the extra experiments")


def command(environment, workdir, settings, *more, program=("experiments.finetune",)):
    """The command in a process of its own."""
    default = Settings()
    given = [
        f"--{f.name}={getattr(settings, f.name)}"
        for f in dataclasses.fields(Settings)
        if getattr(settings, f.name) != getattr(default, f.name)
    ]
    words = [sys.executable, "-m", *program, *given, f"--workdir={workdir}", *more]
    root = Path(__file__).parents[3]
    env = {**environment, "PYTHONPATH": str(root)}
    return subprocess.Popen(words, cwd=root, env=env, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(settings, quick, tmp_path):
    """About 60 core-seconds: SIGKILL once a checkpoint is there, then the same command again."""
    s = dataclasses.replace(settings, steps=40, save_every=2, samples=0, eval_data="")
    word = ("jlora.cli.main", "finetune")
    dry = command(quick, tmp_path / "whole", s, "--dry_run", program=word)
    said, error = dry.communicate()
    assert dry.returncode == 0, error
    assert re.search(r"parameters: 6,864 frozen, .* trained", said) and "40 steps" in said
    assert re.search(r"memory per device: [\d.]+ MiB", said)
    assert not (tmp_path / "whole").exists()
    killed = command(quick, tmp_path / "killed", s)
    while not list((tmp_path / "killed").glob("train-*/checkpoints/step-??????")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "report.json").exists()
    reports = []
    for name in ("killed", "whole"):
        process = command(quick, tmp_path / name, s)
        _, error = process.communicate()
        assert process.returncode == 0, error
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert reports[0]["losses"] == reports[1]["losses"]
    one, two = (tmp_path / n / "peft" / "adapter_model.safetensors" for n in ("killed", "whole"))
    assert one.read_bytes() == two.read_bytes()

"""The study through its command line: what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "flags" / "variants_smoke.flags"


def call(environment, workdir, *more):
    words = [sys.executable, "-m", "experiments.variants", f"--flagfile={SMOKE}",
             f"--workdir={workdir}", *more]  # fmt: skip
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_reports(quick, tmp_path):
    done = call(quick, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["bases"]) == ["base_l"] and len(report["cells"]) == 4
    assert list(report["bases"]["base_l"]["variants"]) == ["EVA", "LoRA"]
    assert all(len(c["test"]) == 2 for c in report["cells"])
    assert "| EVA | initialisation |" in done.stdout
    assert (tmp_path / "variants_base_l.svg").is_file()
    files = {f.name: f for f in tmp_path.glob("cells-*/*.json")}
    assert sorted(files) == ["EVA-2-0.json", "EVA-2-1.json", "LoRA-2-0.json", "LoRA-2-1.json"]


@pytest.mark.slow
def test_an_unknown_variant_is_one_line(quick, tmp_path):
    bad = call(quick, tmp_path, "--variants=Lora")
    assert bad.returncode == 2 and "--variants: got 'Lora', expected some of" in bad.stderr

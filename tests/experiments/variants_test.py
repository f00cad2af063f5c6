"""The study through its command line: what it writes, and that it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "flags" / "variants_smoke.flags"


def call(workdir, *more):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "experiments.variants", f"--flagfile={SMOKE}",
             f"--workdir={workdir}", *more]  # fmt: skip
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_reports_and_resumes_with_what_is_missing(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["variants"]) == ["LoRA", "VeRA"] and len(report["cells"]) == 4
    assert all(len(c["test"]) == 2 for c in report["cells"])
    assert "| VeRA | rank |" in done.stdout and (tmp_path / "variants.svg").is_file()
    files = {f.name: f for f in tmp_path.glob("cells-*/*.json")}
    assert sorted(files) == ["LoRA-2-0.json", "LoRA-2-1.json", "VeRA-2-0.json", "VeRA-2-1.json"]
    kept = files["LoRA-2-1.json"].read_bytes()
    files["LoRA-2-1.json"].unlink()
    for name in ("LoRA-2-0.json", "VeRA-2-0.json", "VeRA-2-1.json"):
        os.utime(files[name], (1, 1))
    again = call(tmp_path, "--variants=LoRA")
    assert again.returncode == 0, again.stderr[-3000:]
    assert files["LoRA-2-1.json"].read_bytes() == kept
    assert files["LoRA-2-0.json"].stat().st_mtime == 1  # read back, not measured again
    bad = call(tmp_path, "--variants=Lora")
    assert bad.returncode == 2 and "--variants: got 'Lora', expected some of" in bad.stderr

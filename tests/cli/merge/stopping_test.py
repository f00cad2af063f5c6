"""A merge that is stopped: its exit status, one line, the target as it was, nothing next to it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from jlora.cli.merge import write

GOLDEN = Path(__file__).parents[3] / "third_party/peft/llama"

STOPPED = """
import os, signal, sys, threading, time
from jlora.cli import main
from jlora.cli.merge import plan, write

name, where = sys.argv.pop(), sys.argv.pop()

def stop():
    os.kill(os.getpid(), getattr(signal, name))

def writing(*args, **options):
    stop()
    time.sleep(60)

def compiling(*args, real=plan.run_chunk, **options):
    threading.Timer(0.05, stop).start()
    for _ in range(1000):  # in XLA nearly all of the time
        import jax
        jax.clear_caches()
        made = real(*args, **options)
    return made

if where == "writing":
    write.safetensors_file.write = writing
else:
    plan.run_chunk = compiling
raise SystemExit(main.main())
"""


@pytest.mark.parametrize("where, name, status", [("writing", "SIGTERM", 143),
                                                 ("compiling", "SIGINT", 130)])  # fmt: skip
def test_a_signal_ends_it_with_its_status_and_one_line(where, name, status, tmp_path):
    config = {
        "merge_method": "ties", "base_model": str(GOLDEN / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(GOLDEN / m)} for m in ("lora", "lora_rslora")],
        "out": {"path": "out", "format": "merged" if where == "writing" else "peft"},
    }  # fmt: skip
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(GOLDEN / "base", tmp_path / "out")
    write.replaceable.mark(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    flags = ["merge", "--config", str(tmp_path / "merge.yaml"), "--overwrite"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JLORA_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", STOPPED, *flags, where, name], env=env, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == status, run.stderr
    last = [
        line for line in run.stderr.splitlines() if not line.startswith("ties:") and line.strip()
    ]
    assert last == [f"stopped by {name}; nothing half-written is left"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def held(path, at, monkeypatch):
    """A thread that overwrites `path`, waiting before rename number `at`; returns it and a go."""
    reached, go, calls, real = threading.Event(), threading.Event(), [], os.replace

    def replace(a, b):
        if threading.current_thread() is thread:
            calls.append(a)
            if len(calls) == at:
                reached.set()
                go.wait(30)
        real(a, b)

    def work():
        try:
            with write.whole(path, True) as new:
                new.mkdir()
                (new / "x").write_text("new")
        except OSError:
            pass

    thread = threading.Thread(target=work)
    monkeypatch.setattr(write.os, "replace", replace)
    thread.start()
    assert reached.wait(30)
    return thread, go


@pytest.mark.parametrize("at", [1, 2, 3])  # the marker, the old one away, the new one there
def test_a_writer_that_goes_on_while_it_is_stopped_changes_nothing(at, tmp_path, monkeypatch):
    path = tmp_path / "out"
    with write.whole(path, False) as new:
        new.mkdir()
        (new / "x").write_text("old")
    thread, go = held(path, at, monkeypatch)
    write.abandon(path)
    go.set()
    thread.join()
    assert (path / "x").read_text() == "old" and len(list(path.iterdir())) == 2
    assert not list(tmp_path.glob(".*"))


def test_a_stop_that_is_killed_itself_is_mended_by_the_next_run(tmp_path):
    (tmp_path / ".out.stopped/old").mkdir(parents=True)
    (tmp_path / ".out.stopped/old/x").write_text("old")
    write.recover(tmp_path / "out")
    assert (tmp_path / "out/x").read_text() == "old"

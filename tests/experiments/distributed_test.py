"""Real processes that share a run: figures do not depend on how many there are.

Two processes on loopback and eight host devices, against one process on one device. The first test
runs the zoo alone; the whole run, report and all, is `long`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "flags" / "text_smoke.flags"
LIMIT = 280  # seconds of one command, so that three of them end before pytest ends the test

TINY = ["--layers=1", "--max_length=8", "--train_texts=10", "--eval_rows=10", "--zoo_steps=2",
        "--zoo_segment=2", "--zoo_seeds=1", "--references=1"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(workdir: Path, compiled: Path, *more: str, processes: int = 1, devices: int = 1):
    """[(exit code, stdout, stderr)] of each process; none is left behind."""
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    env = os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled),
    }  # fmt: skip
    base = [sys.executable, "-m", "experiments.cond_pdiff", f"--flagfile={SMOKE}",
            f"--workdir={workdir}", *more]  # fmt: skip
    place = [[]]
    if processes > 1:
        address = f"--coordinator=127.0.0.1:{free_port()}"
        place = [["--distributed", address, f"--process_id={k}", f"--process_count={processes}"]
                 for k in range(processes)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        started = []
        for flags_of in place:
            process = subprocess.Popen(
                [*base, *flags_of], cwd=ROOT, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(process.communicate)  # closes its pipes
            stack.callback(process.kill)  # called first; nothing to a process that has ended
            started.append(process)
        shown = [process.communicate(timeout=LIMIT) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, shown, strict=True)]


def files(workdir: Path) -> dict[str, bytes]:
    """The arrays of the zoo stage, whatever wrote them."""
    from experiments.config import Config
    from experiments.stages import world, zoo

    (folder,) = workdir.glob("data-*")
    config = Config(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    made = world.build(config, workdir, None)
    found = zoo.read(made, workdir)
    out = {f"trainable{k}": x for k, x in _leaves(found.trainable)}
    out |= {f"multitask{k}": x for k, x in _leaves(found.multitask)}
    return out | {"loss": found.loss, "hidden": np.load(folder / "hidden.npy")}


def _leaves(tree):
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]


@pytest.mark.long
def test_a_zoo_trained_by_two_processes_is_bitwise_that_of_one(tmp_path):
    more = [*TINY, "--stage=data,zoo"]
    (alone,) = run(tmp_path / "one", tmp_path / "compiled", *more)
    assert alone[0] == 0, alone[2][-3000:]
    first, second = run(tmp_path / "two", tmp_path / "compiled", *more, processes=2)
    assert first[0] == second[0] == 0, first[2][-2000:] + second[2][-2000:]
    assert "zoo: 100%" in first[2]
    assert "%|" not in second[2] and not second[1]  # one display, that of process 0
    assert list((tmp_path / "two").glob("zoo-*/*/arrays.npz"))  # the second did some of the work
    want, got = files(tmp_path / "one"), files(tmp_path / "two")
    assert set(want) == set(got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    again = run(tmp_path / "two", tmp_path / "compiled", *more)  # one process reads what two wrote
    assert again[0][0] == 0 and "%|" not in again[0][2]


@pytest.mark.long
def test_processes_with_other_flags_find_it_out(tmp_path):
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    address = f"--coordinator=127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.cond_pdiff", f"--flagfile={SMOKE}",
             f"--workdir={tmp_path / 'run'}", "--distributed", address, f"--process_id={k}",
             "--process_count=2", f"--seed={k}", "--stage=data"],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for k in (0, 1)
    ]  # fmt: skip
    try:
        _, text = started[1].communicate(timeout=LIMIT)
        assert started[1].returncode == 2, text[-2000:]
        assert "error: seed: got 1 in process 1, expected 0 as in process 0" in text
    finally:
        for process in started:
            process.kill()
            process.communicate()  # and its pipes are closed


@pytest.mark.long
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (1, 8)])
def test_the_report_does_not_depend_on_processes_and_devices(tmp_path, processes, devices):
    (alone,) = run(tmp_path / "one", tmp_path / "compiled")
    assert alone[0] == 0, alone[2][-3000:]
    many = run(tmp_path / "many", tmp_path / "compiled", processes=processes, devices=devices)
    assert all(code == 0 for code, _, _ in many), many[0][2][-3000:]
    reports = []
    for name in ("one", "many"):
        report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
        report["config"].pop("command")
        reports.append({k: v for k, v in report.items() if k != "times"})
    assert reports[0] == reports[1]

"""Two processes that train and save one adapter, killed and resumed: as if nothing had happened."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora as jl

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[2]
SECONDS = 300
HOLD = 4  # steps are saved after 2, 4, ...; 5 is being saved when the processes are killed


def load_worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


class Pair:
    """Two worker processes on one free port."""

    def __init__(self, folder, out, hold=-1):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        flags = "--xla_force_host_platform_device_count=2"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        env = {
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths,
            # what the first pair compiled, those after it read
            "JAX_COMPILATION_CACHE_DIR": str(Path(out).parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        self.logs = [Path(f"{out}.{k}.log") for k in range(2)]
        self.processes = []
        for k, log in enumerate(self.logs):
            command = [sys.executable, str(WORKER), str(k), str(port), folder, out, str(hold)]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(list(map(str, command)), env=env, stdout=file, stderr=file)
                )

    def wait(self):
        return [p.wait(SECONDS) for p in self.processes]

    def wait_for(self, word):
        """Until both have said `word`."""
        for _ in range(10 * SECONDS):
            if all(word in log.read_text() for log in self.logs):
                return
            assert all(p.poll() is None for p in self.processes), self.said()
            try:
                self.processes[0].wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"no {word!r} in {SECONDS} s: {self.said()}")

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)

    def kill(self):
        """SIGKILL: nothing is tidied up."""
        for p in self.processes:
            p.kill()
        self.wait()


@pytest.fixture
def start():
    pairs = []

    def run(*args, **kwargs):
        pairs.append(Pair(*args, **kwargs))
        return pairs[-1]

    yield run
    for pair in pairs:
        pair.kill()


def alone(forget=-1):
    """The trainables after the same steps in this process; momentum is lost at step `forget`."""
    adapter = worker.fresh(worker.PARAMS)
    step = jax.jit(worker.update)
    trainable = adapter.trainable
    velocity = worker.optimizer.init(trainable)
    for n in range(worker.STEPS):
        velocity = worker.optimizer.init(trainable) if n == forget else velocity
        trainable, velocity = step(trainable, velocity, adapter, worker.PARAMS, worker.batch(n))
    return trainable


def far(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.mark.slow
def test_killed_and_resumed_ends_as_undisturbed(start, tmp_path):
    whole = start(tmp_path / "whole", tmp_path / "a")
    assert whole.wait() == [0, 0], whole.said()

    killed = start(tmp_path / "broken", tmp_path / "b", hold=HOLD)
    killed.wait_for("holding")
    killed.kill()
    assert [p.returncode for p in killed.processes] == [-9, -9]
    assert not (tmp_path / "b").exists()

    resumed = start(tmp_path / "broken", tmp_path / "b")
    assert resumed.wait() == [0, 0], resumed.said()
    assert "from 4" in resumed.said() or "from 5" in resumed.said()

    undisturbed, ours = (jl.io.restore_adapter(tmp_path / name) for name in "ab")
    assert far(undisturbed, ours) == 0.0
    reference = alone()
    assert far(ours.trainable, reference) < 1e-4
    assert far(alone(forget=4), reference) > 1e-2  # what a resume that loses the momentum would do

"""Two real processes whose devices share each step end where one process with all of them ends."""

import dataclasses
import json
import socket

import jax
import numpy as np
import pytest

from experiments.finetuning import mesh, run
from jlora.io import safetensors_file
from tests.experiments.finetuning.kill_test import command

pytest.importorskip("grain", reason="grain is in the extra experiments")


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(*started):
    """What processes have said; they have all ended well."""
    said = [process.communicate() for process in started]
    for process, (_, error) in zip(started, said, strict=True):
        assert process.returncode == 0, error
    return said


@pytest.mark.slow
def test_two_processes_train_as_one_does(settings, quick, tmp_path):
    """Each has two of four devices, and all of them are needed for the weights."""
    s = dataclasses.replace(settings, steps=4, save_every=2, samples=1, fsdp=2, tensor=2, rank=2)

    def devices(count):
        more = f"--xla_force_host_platform_device_count={count}"
        return quick | {"XLA_FLAGS": f"{quick['XLA_FLAGS']} {more}"}

    def together(workdir, s):
        where = ("--distributed", f"--coordinator=127.0.0.1:{port()}", "--process_count=2")
        team = [command(devices(2), workdir, s, *where, f"--process_id={k}") for k in range(2)]
        return ended(*team)

    first, second = together(tmp_path / "two", s)
    assert "Adapter: " in first[0] and "Adapter: " not in second[0], "one process speaks"
    one = run.run(run.plan(s), tmp_path / "one")
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-5)
    assert one["after"]["loss"] == pytest.approx(two["after"]["loss"], rel=1e-5)
    assert len(two["after"]["answers"]) == 1
    files = (tmp_path / n / "peft" / "adapter_model.safetensors" for n in ("one", "two"))
    ours, theirs = (safetensors_file.read(path)[0] for path in files)
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max())
    again = run.run(
        run.plan(s), tmp_path / "two"
    )  # from the checkpoint of both, nothing is missing
    assert again["losses"] == two["losses"]


def test_a_mesh_must_hold_the_devices_of_all_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"fsdp x tensor: got 2 x 2, expected 8 together"):
        mesh.mesh(2, 2)

"""Several processes share one run (`--distributed`).

A stage's independent pieces of work (a chunk of the zoo, a task to evaluate) are divided among the
processes. One process computes a piece as a whole on its own devices, by the program that a single
process would use, so the figures do not depend on how many there are. Results travel through the
workdir, which all processes must see; they meet at a barrier before and after a stage is committed.
(Fine-tuning joins processes by the same flags, but their devices share every step.)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

WEEK = 7 * 24 * 3600  # seconds at a barrier: another process may be training
ROOM = 1 << 14  # bytes of the settings that processes compare


class Processes(NamedTuple):
    """Which process this is."""

    index: int = 0  # 0: the one that commits stages and writes reports
    count: int = 1  # how many share the work

    @property
    def first(self) -> bool:
        """Whether this process commits stages and writes reports."""
        return self.index == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Positions of the pieces that this process computes.

        The largest remaining piece goes to the process with the least work; every process computes
        the same division.

        Args:
          sizes: [n] work of each piece, in any unit.
        """
        load = [0] * self.count
        mine = []
        for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            to = load.index(min(load))
            load[to] += sizes[position]
            if to == self.index:
                mine.append(position)
        return sorted(mine)

    def wait(self, name: str) -> None:
        """Return when every process has called this with `name`, which must be used only once."""
        if self.count > 1:
            from orbax.checkpoint import multihost

            everyone = set(range(self.count))
            multihost.sync_global_processes(name, timeout=WEEK, processes=everyone)


def define_flags() -> None:
    """Define the flags of a program that several processes can share; `from_flags` reads them."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "share the work with other processes, each started with this command on a machine that"
        " sees the same --workdir",
    )
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0 (default: from the cluster's environment)"
    )
    flags.DEFINE_integer("process_id", None, "which process this is, from 0 (likewise)")
    flags.DEFINE_integer("process_count", None, "how many there are (likewise)")


def from_flags(values: flags.FlagValues) -> Processes:
    """This process's place among those that share the run; it joins them with `--distributed`.

    Raises:
      ValueError: one of the other flags without `--distributed`, or as `start`.
      RuntimeError: as `start`.
    """
    given = {name: values[name].value for name in ("coordinator", "process_id", "process_count")}
    if values["distributed"].value:
        return start(*given.values())
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r}, expected nothing without --distributed")
    return Processes()


def start(coordinator: str | None, index: int | None, count: int | None) -> Processes:
    """Join the other processes; call it before anything uses JAX's devices.

    Args:
      coordinator: host:port of process 0. index, count: which process this is, of how many. All
        three, or none where the cluster's environment tells JAX (Slurm, Open MPI, Kubernetes, TPU).

    Raises:
      ValueError: some of the three without the others, or an index outside 0..count-1.
      RuntimeError: the others did not come, as `jax.distributed.initialize` says.
    """
    given = {"coordinator": coordinator, "process_id": index, "process_count": count}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{missing[0]}: got nothing, expected all of {', '.join(given)} or none")
    if index is not None and count is not None and not 0 <= index < count:
        raise ValueError(f"process_id: got {index}, expected 0 <= process_id < {count}")
    import jax

    jax.distributed.initialize(coordinator, count, index)
    return Processes(jax.process_index(), jax.process_count())


def check(processes: Processes, settings: Mapping[str, Any], workdir: Path) -> None:
    """Find processes that were started with other flags, or that do not see the same workdir.

    Args:
      settings: JSON values that must be the same everywhere.

    Raises:
      ValueError: naming the setting, with what this process has and what process 0 has.
    """
    if processes.count == 1:
        return
    from jax.experimental import multihost_utils

    mark = workdir / "processes"  # holds a number that only this start of the run has
    everything = {**settings, "mark": secrets.token_hex(8)}
    if processes.first:
        mark.write_text(everything["mark"], encoding="utf-8")
    blob = np.zeros(ROOM, np.uint8)
    text = json.dumps(everything, sort_keys=True).encode()
    blob[: len(text)] = np.frombuffer(text, np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(blob)).astype(np.uint8)
    theirs = json.loads(bytes(sent).rstrip(b"\0"))
    for name, value in settings.items():
        if value != theirs.get(name):
            raise ValueError(
                f"{name}: got {value!r} in process {processes.index}, expected"
                f" {theirs.get(name)!r} as in process 0"
            )
    mark_text = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if mark_text != theirs["mark"]:
        raise ValueError(
            f"workdir: process {processes.index} does not see {mark} as process 0 wrote it,"
            " expected a folder that all processes share"
        )

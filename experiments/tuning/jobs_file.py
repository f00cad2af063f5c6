"""The file of many fine-tunings: what they share, and what each of them has of its own.

    base: smollm2                # or a checkpoint directory of Hugging Face
    capacity: 256                # tokens of a row, at least those of the longest example
    rows: 4                      # per step
    block: 16                    # a job's part of a row is padded to whole blocks
    lr: 2.0e-4                   # settings that all jobs share
    jobs:
      - {name: math, data: math.jsonl, rank: 16, lr: 1.0e-4}
      - {name: code, data: code.jsonl, batch: 16, epochs: 2}

A job may set those of `OF_JOB`; all others of `SHARED` are set once. Their meaning and defaults are
those of `python -m experiments.finetune --help`, but for `batch`, which counts examples per step.
Paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import wrong
from experiments.finetuning.settings import Settings, check
from jlora.cli.merge import documents

OF_JOB = (
    "data", "rank", "alpha", "lr", "schedule", "warmup", "batch", "epochs", "steps", "seed",
)  # fmt: skip
SHARED = (
    "base", "base_name", "dtype", "quantize", "quantize_block", "long", "targets", "weight_decay",
    "clip", "remat",
)  # fmt: skip
CAPACITY, ROWS, BLOCK, SAVE_EVERY = 256, 4, 16, 50


class Task(NamedTuple):
    """One job of the file."""

    name: str  # of its folder
    settings: Settings


class Jobs(NamedTuple):
    """The whole file."""

    tasks: tuple[Task, ...]
    capacity: int  # tokens of a row
    rows: int  # per step
    block: int  # tokens per block
    save_every: int  # steps between checkpoints


def read(path: str | Path) -> Jobs:
    """The jobs of a file, checked.

    Args:
      path: of the YAML file.

    Raises:
      ValueError: no such file, no YAML, a key twice, unknown or missing keys, a value out of range,
        names that are equal or no plain names of folders: one line with file, job, got and
        expected.
    """
    source = Path(path)
    try:
        raw = documents.read(source)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("jobs"), list) or not raw["jobs"]:
        raise ValueError(f"{source}: jobs: expected a list of at least one job")
    own = {"capacity": CAPACITY, "rows": ROWS, "block": BLOCK, "save_every": SAVE_EVERY}
    numbers = {name: raw.get(name, default) for name, default in own.items()}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{source}: {wrong(name, value, 'an integer of at least 1')}")
    common = {k: v for k, v in raw.items() if k != "jobs" and k not in own}
    _known(str(source), common, (*SHARED, *OF_JOB))
    tasks: list[Task] = []
    for number, job in enumerate(raw["jobs"]):
        where = f"{source}: jobs[{number}]"
        if not isinstance(job, dict):
            raise ValueError(f"{where}: got {type(job).__name__}, expected a mapping")
        name = job.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{where}: {wrong('name', name, 'letters, digits, -, _ and .')}")
        if name in {t.name for t in tasks}:
            raise ValueError(f"{where}: {wrong('name', name, 'each name once')}")
        own_settings = {k: v for k, v in job.items() if k != "name"}
        _known(f"{where} ({name})", own_settings, OF_JOB)
        tasks.append(Task(name, _settings(f"{where} ({name})", source, common | own_settings)))
    return Jobs(tuple(tasks), **numbers)


def _known(where: str, given: dict[str, Any], names: tuple[str, ...]) -> None:
    for key in given:
        if key not in names:
            raise ValueError(f"{where}: got {key!r}, expected one of {sorted(names)}")


def _settings(where: str, source: Path, given: dict[str, Any]) -> Settings:
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Settings)}
    values = dict(given)
    for name, value in given.items():
        kind = kinds[name]
        if kind is float and type(value) is int:
            values[name] = value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{where}: {wrong(name, value, kind.__name__)}")
    for name in ("data", "base"):
        if name in values and not (name == "base" and values[name] == "smollm2"):
            values[name] = str(source.parent / values[name])
    try:
        settings = Settings(**values)
        check(settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return settings

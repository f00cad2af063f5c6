"""The protocol of a stage, and the one loop that runs stages.

A stage is a record of functions, at the end of its module. `Stage.run(context) -> product`:

1. `prepare` computes what is cheap and the same in every process;
2. `pieces` are independent parts of the work, each of which leaves one file or folder, so that a
   killed run resumes with the missing ones, and several processes can divide them;
3. `finish` gathers the pieces, and the stage's folder is committed (DONE.json);
4. `read` gives the product from the committed folder: a run that resumes and one that was never
   disturbed read the same bytes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import Config
from experiments.processes import Processes
from experiments.progress import Progress
from experiments.workdir import Folder, StageError, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage may read."""

    config: Config  # all settings; the stage's key hashes those up to it
    workdir: Path  # of the run
    cache: Path | None = None  # of downloads; None: the default
    processes: Processes = dataclasses.field(default_factory=Processes)  # which share the work
    products: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of earlier stages
    command: str = ""  # command line, shown in the report

    def add(self, name: str, product: Any) -> Context:
        """The same with one more product."""
        return dataclasses.replace(self, products={**self.products, name: product})


class Piece(NamedTuple):
    """An independent part of a stage's work."""

    path: str  # file or folder in the stage's folder that is there when the piece is finished
    size: int  # length on the progress bar
    make: Callable[[Path, Progress], None]  # make(the stage's folder, bar) writes `path` whole


class Done(NamedTuple):
    """A committed stage."""

    path: Path  # its folder
    info: dict[str, Any]  # what `finish` returned


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the pipeline."""

    name: str  # of its folder, its bar, and of its settings in config.py
    inputs: tuple[str, ...]  # earlier stages whose products it reads
    unit: str  # of the progress bar
    read: Callable[[Context, Any, Done], Any]  # (context, prepared, done) -> product
    describe: Callable[[Any], str]  # what the product is, in one line
    prepare: Callable[[Context], Any] = lambda context: None  # once per process
    pieces: Callable[[Context, Any], Sequence[Piece]] = lambda context, prepared: ()
    # finish(context, prepared, folder) -> info. Every process calls it, for what Orbax writes
    # together; all other files are written by process 0.
    finish: Callable[[Context, Any, Path], dict[str, Any]] = lambda context, prepared, folder: {}
    kept: bool = True  # False: it has no folder, and process 0 alone runs it, each time

    def folder(self, context: Context) -> Folder:
        """Its folder in the workdir, named by a hash of the settings that it depends on."""
        return Folder(context.workdir, self.name, context.config.key(self.name))

    def run(self, context: Context) -> Any:
        """Do what is missing and return the product.

        Raises:
          StageError: an input is missing or a file is damaged.
        """
        missing = [name for name in self.inputs if name not in context.products]
        if missing:
            raise StageError(f"stage '{self.name}': got no product of {missing}, expected all")
        if not self.kept:
            empty = Done(context.workdir, {})
            return self.read(context, None, empty) if context.processes.first else None
        folder = self.folder(context)
        finished = folder.done
        info = folder.verify() if finished else {}  # damage is found before anything is computed
        prepared = self.prepare(context)
        if not finished:
            self._make(context, prepared, folder)
            info = folder.verify()
        return self.read(context, prepared, Done(folder.path, info))

    def _make(self, context: Context, prepared: Any, folder: Folder) -> None:
        """Make this process's pieces; process 0 commits when all are there."""
        path, team = folder.open(), context.processes
        pieces = self.pieces(context, prepared)
        mine = [pieces[k] for k in team.share([piece.size for piece in pieces])]
        total = sum(piece.size for piece in mine)
        with Progress(context.workdir, self.name, total, self.unit, process=team.index) as bar:
            for piece in mine:
                if (path / piece.path).exists():
                    bar.step(piece.size)
                else:
                    piece.make(path, bar)
        team.wait(f"{path.name}/pieces")
        info = self.finish(context, prepared, path)
        if team.first:
            folder.commit(info)
        team.wait(f"{path.name}/done")


class Times:
    """Seconds of each stage, added up over restarts in <workdir>/times.json."""

    def __init__(self, workdir: Path):
        self.path = workdir / "times.json"

    def all(self) -> dict[str, float]:
        """{stage: seconds}. Raises StageError for a damaged file."""
        if not self.path.is_file():
            return {}
        known = read_json(self.path, dict, "delete it: only seconds are lost")
        bad = {k: v for k, v in known.items() if not isinstance(v, int | float)}
        if bad:
            raise StageError(f"{self.path}: got {bad}, expected seconds; delete it")
        return known

    def add(self, name: str, seconds: float) -> float:
        """Add to a stage's seconds and return their sum."""
        known = self.all()
        known[name] = round(known.get(name, 0.0) + seconds, 1)
        write_json(self.path, known)
        return known[name]


def run(stages: Sequence[Stage], wanted: Sequence[str], context: Context) -> Context:
    """Run all stages up to the last wanted one; returns the context with their products.

    A stage that is not wanted must be finished, except the first, on which all depend. After each
    stage one line on stderr says what came out of it.
    """
    times, team = Times(context.workdir), context.processes
    if team.first:
        times.all()  # a damaged file is found now, not after the first stage
    last = max(k for k, stage in enumerate(stages) if stage.name in wanted)
    for stage in stages[: last + 1]:
        folder = stage.folder(context)
        if stage is not stages[0] and stage.name not in wanted and not folder.done:
            raise StageError(
                f"{folder.path}: stage '{stage.name}' is needed and not finished; add it to --stage"
            )
        start = time.monotonic()
        try:
            context = context.add(stage.name, stage.run(context))
        finally:
            if team.first:
                seconds = times.add(stage.name, time.monotonic() - start)
        if team.first:
            line = f"{stage.describe(context.products[stage.name])} ({seconds:.0f} s)"
            print(f"{stage.name:>10}: {line}", file=sys.stderr, flush=True)
    return context


def load(stages: Sequence[Stage], context: Context) -> Context:
    """Read finished stages; nothing is made. Raises StageError for the first that is not."""
    for stage in stages:
        stage.folder(context).verify()
    for stage in stages:
        context = context.add(stage.name, stage.run(context))
    return context

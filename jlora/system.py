"""The record that the file of every published system ends with.

A file that implements a system assigns ``SYSTEM = System(...)``, or ``SYSTEMS = (...)`` where one
file holds several. `jlora.registry` walks the rooms and collects them: adding a system means adding
its file and its test file, and editing nothing else.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from jlora.types import Batch

Kind = Literal["mechanism", "composition", "recipe", "analysis", "component"]
KINDS: tuple[Kind, ...] = ("mechanism", "composition", "recipe", "analysis", "component")


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One published system, as its own file declares it.

    Attributes:
      name: the published name, unique: "DoRA".
      paper: first author, year, arXiv number or venue; "none" for components of jlora's own.
      symbol: the public object of the file that implements it: "DoRA", "ties".
      evidence: what its tests have measured, in one line.
      kind: "mechanism" (its own equation), "composition" (of other systems), "recipe" (a training
        procedure on plain LoRA), "analysis", or "component" (a part that systems are built from,
        which needs no claim).
      rows: the rows of `jlora.work_list` that it serves; () when it has none.
      tests: test files besides the one that mirrors the module (``tests/<path>_test.py``), relative
        to the repository; "" in front leaves the mirrored one out.
      claim: the name of its claim, ``experiments/claims/<claim>.py``; "" while it has none.
      more_claims: names of further claims, of what one inequality does not say.
      missing: what the work list asks for and the file does not do yet; "" when nothing.
      examples: tiny instances for the contract suite (adaptation methods).
      breaks: a law of the contract suite -> the reason why this system breaks it.
    """

    laws: ClassVar[tuple[str, ...]] = ()  # of the kind's contract; (): names in `breaks` are free
    suite: ClassVar[tuple[str, ...]] = ()  # test files that run every system of the kind

    name: str
    paper: str
    symbol: str
    evidence: str
    kind: Kind = "mechanism"
    rows: tuple[int, ...] = ()
    tests: tuple[str, ...] = ()
    claim: str = ""
    more_claims: tuple[str, ...] = ()
    missing: str = ""
    examples: tuple[Batch, ...] = ()
    breaks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind: got {self.kind!r}, expected one of {KINDS}")
        for law in self.breaks.keys() - set(self.laws or self.breaks):
            raise ValueError(f"{self.name}: breaks: got {law!r}, expected one of {self.laws}")
        if self.more_claims and not self.claim:
            raise ValueError(f"{self.name}: more_claims: got {self.more_claims}, expected a claim")

    @property
    def claims(self) -> tuple[str, ...]:
        """Names of all its claims; () while it has none."""
        return tuple(c for c in (self.claim, *self.more_claims) if c)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A record, and where the walk of the registry met it."""

    system: System
    module: str  # "jlora.methods.decomposed.dora"

    @property
    def family(self) -> str:
        """The room: "methods", "merging", ..."""
        return self.module.split(".")[1]

    @property
    def tests(self) -> tuple[str, ...]:
        """All test files of the system, relative to the repository."""
        mirrored = f"tests/{self.module.removeprefix('jlora.').replace('.', '/')}_test.py"
        suite = ("tests/contract_test.py",) if self.family == "methods" else self.system.suite
        if "" in self.system.tests:
            mirrored = ""
        return tuple(t for t in (mirrored, *self.system.tests, *suite) if t)

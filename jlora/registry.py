"""All systems of jlora: a walk over the rooms that collects the record of every file.

A file with a record (`jlora.system.System`) is a system; nothing else has to be edited. The state
of a system is computed from what the checkout holds, never written down:

- ``works``: its tests exist, nothing is declared missing, and each of its claims has a record
  (``docs/results/claims/<claim>.json``) made by the present claim file (same sha256) and by the
  present code that claim files share (`shared_code`), with any verdict but void;
- ``partial``: something of this is missing, and `State.missing` says what;
- ``absent``: a row of `jlora.work_list` that no file serves.

A component (`System.kind`) is a part of systems and needs no claim. Without a checkout (an
installed package has no tests) states are ``unknown``.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jlora
from jlora.system import Placed, System
from jlora.types import Dynamic
from jlora.work_list import ROWS, Row

CLAIMS = "experiments/claims"
HARNESS = ("__init__", "protocol", "runner")  # files of that folder that measure nothing
RECORDS = "docs/results/claims"
SKIPPED = ("jlora.cli", "jlora.merge", "jlora.systems", "jlora.serving.server")  # programs


class State(NamedTuple):
    """How far a system is, and what it lacks."""

    name: str  # works, partial, absent or unknown
    missing: tuple[str, ...] = ()  # what is not there, in words


def walk(package: ModuleType) -> Iterator[Placed]:
    """The records of all modules below `package`, in the order of their names.

    Args:
      package: an imported package; all its modules are imported.

    Returns:
      One record after the other, with its module.

    Raises:
      TypeError: a module assigns SYSTEM or SYSTEMS something that is not a record.
    """
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if info.name.startswith(SKIPPED) or info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        records = vars(module).get("SYSTEMS", vars(module).get("SYSTEM", ()))
        for system in records if isinstance(records, tuple) else (records,):
            if not isinstance(system, System):
                raise TypeError(f"{info.name}: got {system!r}, expected a jlora.system.System")
            yield Placed(system=system, module=info.name)


@functools.cache
def systems() -> tuple[Placed, ...]:
    """Every system of jlora.

    Returns:
      In the order of modules.

    Raises:
      ValueError: two records have one name.
    """
    placed = tuple(walk(jlora))
    seen: dict[str, str] = {}
    for p in placed:
        if p.system.name in seen:
            raise ValueError(f"{p.system.name}: in {seen[p.system.name]} and in {p.module}")
        seen[p.system.name] = p.module
    return placed


def methods() -> dict[str, System]:
    """The records of the adaptation methods.

    Returns:
      By name.
    """
    return {p.system.name: p.system for p in systems() if p.family == "methods"}


def load(placed: Placed) -> Dynamic:
    """The public object of a system.

    Args:
      placed: the system.

    Returns:
      The class or function that its record names.
    """
    return getattr(importlib.import_module(placed.module), placed.system.symbol)


def checkout() -> Path | None:
    """The repository that this package is imported from.

    Returns:
      Its root; None where the package is installed without one.
    """
    root = Path(jlora.__file__).resolve().parents[1]
    return root if (root / "tests").is_dir() and (root / "jlora").is_dir() else None


def state(placed: Placed, root: Path | None) -> State:
    """How far one system is.

    Args:
      placed: the system.
      root: the repository; None: the state is unknown.

    Returns:
      The state, and what is missing.
    """
    if root is None:
        return State("unknown")
    system = placed.system
    missing = [f"{t} does not exist" for t in placed.tests if not (root / t).is_file()]
    missing += [system.missing] if system.missing else []
    if system.kind != "component":
        for claim in system.claims or ("",):
            missing += _claim_problems(claim, root)
    return State("partial", tuple(missing)) if missing else State("works")


def _claim_problems(claim: str, root: Path) -> list[str]:
    if not claim:
        return ["no claim"]
    file, record = root / CLAIMS / f"{claim}.py", root / RECORDS / f"{claim}.json"
    if not file.is_file():
        return [f"{CLAIMS}/{claim}.py does not exist"]
    if not record.is_file():
        return [f"claim {claim} has not been run"]
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return [f"{RECORDS}/{claim}.json: got no JSON ({error}), expected a record"]
    if not isinstance(stored, dict):
        return [f"{RECORDS}/{claim}.json: got {type(stored).__name__}, expected a record"]
    void = [f"claim {claim} is void: its control did not fail"] * (stored.get("verdict") == "void")
    # a hash that was renewed by hand is no evidence that the present code gives these figures
    hand = [f"claim {claim}: hash renewed without a run"] * ("rehashed" in stored)
    return [
        *void,
        *hand,
        *(f"claim {claim}: {f} has changed since it was run" for f in changed(claim, root, stored)),
    ]


def changed(claim: str, root: Path, record: Mapping[str, Dynamic]) -> tuple[str, ...]:
    """The files of a claim whose code is not what its record was made by.

    Args:
      claim: the name of a claim file that exists.
      root: the repository.
      record: of the claim.

    Returns:
      Their names; () where the record is of the present code.
    """
    file = root / CLAIMS / f"{claim}.py"
    same = record.get("claim_sha256") == hashlib.sha256(file.read_bytes()).hexdigest()
    now, then = shared_code(claim, root), record.get("shared_sha256", {})
    differ = sorted(f for f in now.keys() | then.keys() if now.get(f) != then.get(f))
    return tuple([] if same else [f"{claim}.py"]) + tuple(differ)


def shared_code(claim: str, root: Path) -> dict[str, str]:
    """The code that a claim shares with others: its imports of the folder of claims.

    Args:
      claim: the name of a claim file that exists.
      root: the repository.

    Returns:
      {file: `code_sha256`}, of direct and indirect imports.
    """
    folder, modules, open_ = root / CLAIMS, {}, [claim]
    while open_:
        for name in _imported((folder / f"{open_.pop()}.py").read_bytes()):
            path = folder / f"{name}.py"
            if name not in (*HARNESS, claim) and path.is_file() and path.name not in modules:
                modules[path.name] = code_sha256(path)
                open_.append(name)
    return modules


@functools.cache  # every claim reads the same few files
def _imported(source: bytes) -> tuple[str, ...]:
    """Names of the modules of the folder of claims that a file of this source imports."""
    room, names = CLAIMS.replace("/", "."), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == room:
            names += [n.name for n in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{room}."):
            names.append(str(node.module).removeprefix(f"{room}."))
        elif isinstance(node, ast.Import):
            inside = (n.name for n in node.names if n.name.startswith(f"{room}."))
            names += [name.removeprefix(f"{room}.") for name in inside]
    return tuple(names)


def code_sha256(path: Path) -> str:
    """A hash of a Python file that comments, docstrings and line breaks do not change.

    Args:
      path: the file.

    Returns:
      sha256 of its syntax tree, hexadecimal.
    """
    return _code_sha256(path.read_bytes())


@functools.cache
def _code_sha256(source: bytes) -> str:
    return hashlib.sha256(repr(_plain(ast.parse(source))).encode()).hexdigest()


def _plain(node: Dynamic) -> Dynamic:
    """A syntax tree as tuples, without docstrings and without what is empty.

    Fields that later versions of Python add are empty here, so versions agree.
    """
    if isinstance(node, list):
        return tuple(_plain(n) for n in node)
    if not isinstance(node, ast.AST):
        return node
    fields = {k: v for k, v in ast.iter_fields(node) if v not in (None, [])}
    has_doc = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
    if has_doc and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    return type(node).__name__, tuple((k, _plain(v)) for k, v in fields.items())


@dataclasses.dataclass(frozen=True)
class RowState:
    """A row of the work list with what serves it."""

    row: Row  # number, name, kind
    systems: tuple[Placed, ...]  # what lists this row; () when absent
    state: State  # of all of them together


def work_list(root: Path | None) -> tuple[RowState, ...]:
    """All rows of the work list, absent ones too. A row works when every system that serves it
    does.

    Args:
      root: the repository; None: states are unknown.

    Returns:
      One entry per row.
    """
    out = []
    for row in ROWS:
        serving = tuple(p for p in systems() if row.number in p.system.rows)
        states = [state(p, root) for p in serving]
        missing = tuple(
            f"{p.system.name}: {m}"
            for p, s in zip(serving, states, strict=True)
            for m in s.missing
        )  # fmt: skip
        names = {s.name for s in states}
        name = "absent" if not states else names.pop() if len(names) == 1 else "partial"
        out.append(RowState(row, serving, State(name, missing)))
    return tuple(out)

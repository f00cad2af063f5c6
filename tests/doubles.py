"""Systems broken on purpose: a function, or a name that a module reads, replaced until a test ends.

`broken` wraps the right piece in a wrong one. A function of the module itself is exchanged wherever
it is held: in other modules that imported it by name, in records of merges, in the test file that
runs. A name that the module imported, or a builtin, is exchanged in that module alone. Compiled
programs know nothing of it: clear JAX's caches.
"""

import builtins
import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.merging import METHODS

TESTS = Path(__file__).parent
HELD = ("function", "rule", "certificate")  # fields of a record of a merge

Change = Callable[[Any], Any]  # the right piece -> a wrong one


def given(change: Callable[..., tuple]) -> Change:
    """The right function of other positional arguments."""
    return lambda right: lambda *a, **k: right(*change(*a), **k)


def options(**wrong: Any) -> Change:
    """The right function with some keywords as they are here."""
    return lambda right: lambda *a, **k: right(*a, **{**k, **wrong})


def returns(change: Callable[..., Any]) -> Change:
    """What the right function gives, changed: (result, *positional arguments) -> result."""
    return lambda right: lambda *a, **k: change(right(*a, **k), *a)


def instead(other: Any) -> Change:
    """Something else altogether."""
    return lambda right: other


def where(spec: str, wrong: Callable[..., Any]) -> Change:
    """An einsum that is wrong for one equation: (the right einsum, *operands) -> result."""

    def change(right: Any) -> Any:
        return lambda s, *x: wrong(lambda *y: right(s, *y), *x) if s == spec else right(s, *x)

    return change


def names(**wrong: Any) -> Change:
    """A module such as jax.numpy in which some names are others."""

    class Changed:
        def __init__(self, right: Any):
            self.right = right

        def __getattr__(self, name: str) -> Any:
            return wrong[name] if name in wrong else getattr(self.right, name)

    return Changed


def broken(monkeypatch: Any, name: str, piece: str, change: Change, *tests: Any) -> None:
    """A piece of module `name` is wrong until the test ends.

    Args:
      monkeypatch: pytest's.
      name: "jlora.merging.exact.concat".
      piece: a name that the module's functions read: one of its own, an imported one, a builtin.
      change: the right piece -> the wrong one.
      tests: modules of tests that may hold it by name.

    Raises:
      AttributeError: there is no such name.
    """
    module = importlib.import_module(name)
    builtin = piece not in vars(module)
    right = getattr(builtins if builtin else module, piece)
    wrong = change(right)
    monkeypatch.setattr(module, piece, wrong, raising=not builtin)
    if getattr(right, "__module__", None) != name:
        return
    everywhere = [m for n, m in list(sys.modules.items()) if n.startswith("jlora")]
    for held in (*everywhere, *tests):
        for attribute, value in list(vars(held).items()):
            if value is right:
                monkeypatch.setattr(held, attribute, wrong)
    for row in list(METHODS.values()):
        fields = {f: wrong for f in HELD if getattr(row, f) is right}
        if fields:
            monkeypatch.setitem(METHODS, row.name, dataclasses.replace(row, **fields))


def module_of(name: str, *rooms: str) -> str:
    """The only module called `name` below these packages of jlora."""
    found = []
    for package in (f"jlora.{room}" for room in rooms):
        below = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        found += [m.name for m in below if m.name.endswith(f".{name}") and not m.ispkg]
    (only,) = found
    return only


def load(name: str, *rooms: str) -> types.ModuleType:
    """A fresh copy of the only test file `<name>_test.py` below these folders of `tests/`."""
    (file,) = [f for room in rooms for f in (TESTS / room).rglob(f"{name}_test.py")]
    spec = importlib.util.spec_from_file_location("mutated", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

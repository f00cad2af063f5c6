"""Modules broken on purpose: one piece of the source replaced, wherever its functions are held.

`broken` swaps the code of the functions that differ, so it does not matter who imported them by
name; `load` reads a test file anew. Compiled programs know nothing of it: clear JAX's caches.
"""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import types
from pathlib import Path

TESTS = Path(__file__).parent


def broken(monkeypatch, name: str, right: str, wrong: str) -> None:
    """`right`, which the source of module `name` holds once, becomes `wrong` until the test ends.

    Raises ValueError where it is not there once, or where no function is another one then.
    """
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    if source.count(right) != 1:
        raise ValueError(f"{name}: got {source.count(right)} of {right!r}, expected one")
    copy = types.ModuleType(name)
    exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), copy.__dict__)
    before, after = functions(module), functions(copy)
    changed = [k for k, f in before.items() if f.__code__ != after[k].__code__]
    if not changed:
        raise ValueError(f"{name}: {right!r} to {wrong!r} changes no function")
    for k in changed:
        monkeypatch.setattr(before[k], "__code__", after[k].__code__)


def module_of(name: str, *rooms: str) -> str:
    """The only module called `name` below these packages of jlora."""
    found = []
    for package in (f"jlora.{room}" for room in rooms):
        below = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        found += [m.name for m in below if m.name.endswith(f".{name}") and not m.ispkg]
    (only,) = found
    return only


def functions(module: types.ModuleType) -> dict[str, types.FunctionType]:
    """The functions of a module and of its classes, without what wraps them."""
    found = {}
    for name, value in vars(module).items():
        own = vars(value) if isinstance(value, type) else {"": value}
        for inner, f in own.items():
            while hasattr(f, "__wrapped__"):
                f = f.__wrapped__
            f = f.func if isinstance(f, functools.partial) else f
            if isinstance(f, types.FunctionType) and f.__module__ == module.__name__:
                found[f"{name}.{inner}"] = f
    return found


def load(name: str, *rooms: str) -> types.ModuleType:
    """A fresh copy of the only test file `<name>_test.py` below these folders of `tests/`."""
    (file,) = [f for room in rooms for f in (TESTS / room).rglob(f"{name}_test.py")]
    spec = importlib.util.spec_from_file_location("mutated", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

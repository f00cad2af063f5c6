"""The registry is true: what it lists exists, what exists is listed."""

import dataclasses
import inspect
import pkgutil
from pathlib import Path

import pytest

import jlora.methods
from jlora import registry, systems
from jlora.contract import LAWS
from jlora.core.adapter import Method
from jlora.merging.engine.table import LAWS as MERGING_LAWS

ROOT = Path(__file__).parents[1]


def check(rows):
    names = [s.name for s in rows]
    assert len(set(names)) == len(names)
    for s in rows:
        assert s.family in registry.FAMILIES and s.kind in registry.KINDS, s
        assert s.state in registry.STATES and bool(s.missing) == (s.state == "partial"), s
        assert s.load() is not None
        assert s.tests, s
        for test in s.tests:
            assert (ROOT / test).is_file(), f"{s.name}: {test}"
        assert s.paper and s.evidence
        assert set(s.breaks) <= set(MERGING_LAWS if s.family == "merging" else LAWS)
        if s.family == "method":
            assert s.examples and all(type(e) is s.load() for e in s.examples), s
            doc = inspect.getdoc(inspect.getmodule(s.load())) or ""
            for line in ("Source:", "Deviates:", ".. math::"):
                assert line in doc, f"{s.name}: its module's docstring lacks {line!r}"


def test_every_row_is_true():
    check(registry.SYSTEMS)


def test_every_method_is_listed():
    exported = {
        name
        for name, value in vars(jlora.methods).items()
        if inspect.isclass(value) and issubclass(value, Method)
    }
    assert exported == set(registry.methods())
    files = {m.name for m in pkgutil.iter_modules(jlora.methods.__path__)}
    assert files == {s.module.rsplit(".", 1)[1] for s in registry.methods().values()}


def test_the_table_is_printed_and_filtered(capsys):
    assert systems.main([]) == 0
    out = capsys.readouterr().out
    assert all(s.name in out for s in registry.SYSTEMS)
    assert systems.main(["dora"]) == 0
    out = capsys.readouterr().out
    assert "DoRA" in out and "LoKr" not in out
    assert systems.main(["no such thing"]) == 1


BROKEN = {
    "module": {"module": "jlora.methods.nothing"},
    "symbol": {"symbol": "Nothing"},
    "test": {"tests": ("tests/nothing_test.py",)},
    "state": {"state": "partial"},
    "law": {"breaks": {"L99": "?"}},
    "examples": {"examples": ()},
}


@pytest.mark.parametrize("change", BROKEN)
def test_mutation_a_false_row_is_seen(change):
    row = dataclasses.replace(registry.SYSTEMS[0], **BROKEN[change])
    with pytest.raises((AssertionError, ImportError, AttributeError)):
        check([row])

"""The registry is true: what it lists exists, what exists is listed, states are computed."""

import dataclasses
import hashlib
import inspect
import json
import sys
import textwrap

import pytest

import jlora.methods
from jlora import registry
from jlora.contract import LAWS
from jlora.core.method import Method
from jlora.merging.engine.table import LAWS as MERGING_LAWS
from jlora.system import Placed, System

ROOT = registry.checkout()


def check(placed):
    """What must hold of one record."""
    system = placed.system
    assert registry.load(placed) is not None
    assert system.paper and system.evidence
    for test in placed.tests:
        assert (ROOT / test).is_file(), f"{system.name}: {test}"
    if placed.family in ("merging", "methods"):  # the other records check their own
        assert set(system.breaks) <= set(MERGING_LAWS if placed.family == "merging" else LAWS)
    assert set(system.rows) <= set(range(1, 98))
    if placed.family == "methods":
        assert system.examples, system.name
        assert all(type(e) is registry.load(placed) for e in system.examples), system.name
        doc = inspect.getdoc(inspect.getmodule(registry.load(placed))) or ""
        for line in ("Deviates:", ".. math::"):
            assert line in doc, f"{system.name}: its module's docstring lacks {line!r}"


@pytest.mark.parametrize("placed", registry.systems(), ids=lambda p: p.system.name)
def test_a_record_is_true(placed):
    check(placed)


def test_every_exported_method_is_listed():
    exported = {
        name
        for name, value in vars(jlora.methods).items()
        if inspect.isclass(value) and issubclass(value, Method)
    }
    assert exported == set(registry.methods())


def _dora():
    return next(p for p in registry.systems() if p.system.name == "DoRA")


BROKEN = {
    "module": lambda p: dataclasses.replace(p, module="jlora.methods.nothing"),
    "symbol": lambda p: changed(p, symbol="Nothing"),
    "test": lambda p: changed(p, tests=("tests/nothing_test.py",)),
    "law": lambda p: changed(p, breaks={"L99": "?"}),
    "row": lambda p: changed(p, rows=(98,)),
    "examples": lambda p: changed(p, examples=()),
}


def changed(placed, **fields):
    return dataclasses.replace(placed, system=dataclasses.replace(placed.system, **fields))


@pytest.mark.parametrize("name", BROKEN)
def test_mutation_a_false_record_is_seen(name):
    with pytest.raises((AssertionError, ImportError, AttributeError)):
        check(BROKEN[name](_dora()))


def test_a_kind_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="got 'invention', expected one of"):
        dataclasses.replace(_dora().system, kind="invention")


# --- states: computed from the checkout ---------------------------------------------------------


SAME = "from experiments.claims import shared  # another comment\n"
SHARED = '''
"""What claims share."""

import experiments.claims.deeper
from experiments.claims.runner import load


def twice(x):
    """Doubles."""
    return 2 * x
'''
THRICE = SHARED.replace("2 * x", "3 * x")


@pytest.fixture
def checkout(tmp_path):
    """A repository with one system whose tests and claim exist and whose record is up to date."""
    claim = tmp_path / registry.CLAIMS / "toy.py"
    record = tmp_path / registry.RECORDS / "toy.json"
    test = tmp_path / "tests" / "toy_test.py"
    for path in (claim, record, test):
        path.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text("from experiments.claims import shared\n")
    claim.with_name("shared.py").write_text(SHARED)
    claim.with_name("deeper.py").write_text("VALUE = 1\n")
    test.write_text("a test")
    sha = hashlib.sha256(claim.read_bytes()).hexdigest()
    shared = registry.shared_code("toy", tmp_path)
    assert sorted(shared) == ["deeper.py", "shared.py"]
    record.write_text(json.dumps({"claim_sha256": sha, "shared_sha256": shared}))
    return tmp_path


TOY = Placed(
    system=System(name="Toy", paper="none", symbol="toy", evidence="-", claim="toy"),
    module="jlora.toy",
)


def test_a_system_works_when_tests_and_a_record_of_the_present_claim_exist(checkout):
    assert registry.state(TOY, checkout) == registry.State("works")
    assert registry.state(TOY, None).name == "unknown"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: (r / "tests" / "toy_test.py").unlink(), "tests/toy_test.py does not exist"),
        (lambda r: (r / registry.CLAIMS / "toy.py").unlink(), "toy.py does not exist"),
        (lambda r: (r / registry.RECORDS / "toy.json").unlink(), "has not been run"),
        (lambda r: (r / registry.CLAIMS / "toy.py").write_text(SAME), "toy.py has changed since"),
        (lambda r: (r / registry.CLAIMS / "deeper.py").write_text("VALUE = 2"), "deeper.py has"),
        (lambda r: (r / registry.CLAIMS / "deeper.py").unlink(), "deeper.py has changed"),
        (lambda r: (r / registry.CLAIMS / "shared.py").write_text(THRICE), "shared.py has"),
    ],
)
def test_a_system_is_partial_when_one_of_them_is_missing(checkout, damage, said):
    damage(checkout)
    state = registry.state(TOY, checkout)
    assert state.name == "partial" and len(state.missing) == 1 and said in state.missing[0]


@pytest.mark.parametrize("verdict", ["reproduced", "undecided", "other way round", "void"])
def test_a_void_claim_is_none_and_any_other_verdict_is_one(checkout, verdict):
    record = checkout / registry.RECORDS / "toy.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "verdict": verdict}))
    said = ("claim toy is void: its control did not fail",) if verdict == "void" else ()
    assert registry.state(TOY, checkout).missing == said


def test_a_hash_renewed_by_hand_is_no_run(checkout):
    record = checkout / registry.RECORDS / "toy.json"
    assert registry.state(TOY, checkout).name == "works"
    record.write_text(json.dumps({**json.loads(record.read_text()), "rehashed": "why"}))
    assert registry.state(TOY, checkout).missing == ("claim toy: hash renewed without a run",)


def test_words_of_shared_code_may_change(checkout):
    other = "# a comment\n" + SHARED.replace("Doubles.", "Two times.").replace("2 * x", "(2 *\n x)")
    (checkout / registry.CLAIMS / "shared.py").write_text(other)
    assert registry.state(TOY, checkout) == registry.State("works")


def test_declared_gaps_and_absent_claims_keep_a_system_partial(checkout):
    gap = changed(TOY, missing="the vision half")
    assert registry.state(gap, checkout) == registry.State("partial", ("the vision half",))
    none = changed(TOY, claim="")
    assert registry.state(none, checkout) == registry.State("partial", ("no claim",))
    assert registry.state(changed(none, kind="component"), checkout).name == "works"


def test_each_of_several_claims_needs_a_record(checkout):
    both = changed(TOY, more_claims=("shared",))
    assert registry.state(both, checkout).missing == ("claim shared has not been run",)
    assert both.system.claims == ("toy", "shared")
    with pytest.raises(ValueError, match=r"Toy: more_claims: got .*, expected a claim"):
        changed(both, claim="")


def test_all_97_rows_appear_and_a_row_is_as_far_as_its_last_system():
    rows = registry.work_list(ROOT)
    assert [r.row.number for r in rows] == list(range(1, 98))
    for r in rows:
        assert (r.state.name == "absent") == (not r.systems)
        if r.state.name == "works":
            assert all(registry.state(p, ROOT).name == "works" for p in r.systems)


# --- a system is one file -----------------------------------------------------------------------

FILE = '''
    """A file of a package that did not exist before."""

    from jlora.system import System


    def doubled(x):
        return 2 * x


    SYSTEM = System(name="Doubled", paper="none", symbol="doubled", evidence="by hand", rows=(97,))
'''


def test_a_new_file_is_a_system_and_nothing_else_is_edited(tmp_path, monkeypatch):
    package = tmp_path / "newroom"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "doubled.py").write_text(textwrap.dedent(FILE))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import newroom

        (placed,) = registry.walk(newroom)
        assert (placed.module, placed.system.rows) == ("newroom.doubled", (97,))
        assert registry.load(placed)(3) == 6
        (package / "wrong.py").write_text("SYSTEM = 'a string'")
        with pytest.raises(TypeError, match=r"newroom\.wrong: got 'a string', expected"):
            list(registry.walk(newroom))
    finally:
        for name in [n for n in sys.modules if n.startswith("newroom")]:
            del sys.modules[name]

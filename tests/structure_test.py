"""The floor plan holds: no import goes up or sideways, and the core stays small enough to read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jlora"
BELOW = {  # a part of jlora: the other parts that it may import
    "types": set(),  # names of types; every part may import it
    "system": set(),
    "work_list": {"system"},
    "lapack": set(),
    "numerics": {"lapack"},
    "torch_random": set(),
    "core": set(),
    "quantized": set(),
    "sharding": {"core"},
    "algebra": {"numerics", "core", "system"},
    "contracts": {"algebra", "core", "system"},  # of systems in any room above
    "analysis": {"numerics", "core", "system"},  # what sites see of data, what training changes
    "routing": {"core", "contracts", "system"},
    "methods": {"numerics", "torch_random", "algebra", "core", "routing", "system"},
    "inits": {"numerics", "analysis", "core", "contracts", "methods", "quantized", "system"},
    "penalties": {"numerics", "contracts", "core", "methods", "system"},
    "optimizers": {"contracts", "core", "numerics", "system"},
    "generation": {"numerics", "core", "algebra", "contracts", "system"},
    "pruning": {"numerics", "core", "system"},  # units of a model, and LoRA on both sides
    "packing": {"core", "methods", "system"},  # jobs that are trained together
    "schedules": {"numerics", "core", "algebra", "contracts", "methods", "system"},
    "merging": {"numerics", "core", "algebra", "methods", "system"},  # merges give LoRA adapters
    "retrieval": {"numerics", "core", "algebra", "merging", "system"},
    "compose": {"numerics", "core", "algebra", "contracts", "merging", "system"},
    "preference": {"contracts", "core", "system"},
    "continual": {"contracts", "core", "methods", "system"},
    "federated": {"numerics", "core", "algebra", "contracts", "merging", "system"},
    "io": {"core", "methods", "inits", "torch_random"},  # files whose start PEFT makes again
    "models": {"core", "io", "system"},  # an attention pattern is a published system
    "transfer": {"core", "models", "system"},  # to another base, with text that a decoder writes
    "serving": {"contracts", "core", "io", "models", "system"},  # a decoder, adapters in files
    "contract": {"core", "io", "sharding"},
    "registry": {"system", "work_list"},  # and every room, by walking them
    "cli": {"core", "algebra", "io", "merging", "models", "registry", "serving"},
    "merge": {"core", "cli"},
    "systems": {"cli"},
    "__init__": {
        *(
            "algebra",
            "core",
            "inits",
            "io",
            "lapack",
            "merge",
            "merging",
            "methods",
            "quantized",
            "serving",
        ),
        *("retrieval", "sharding", "transfer"),
    },
}
CORE = 2_780  # lines of code, all of core/ together; docs/core.md says what they do
FILE = 240  # of one file of it
LONG = 350  # lines of any file, all counted
LONGER: set[str] = set()  # this list may only shrink


def imported(source):
    """The parts of jlora that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("jlora.")}


def code(source):
    """How many lines are neither empty nor comment nor docstring."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(
        bool(t.strip()) and not t.strip().startswith("#") and n not in docs for n, t in lines
    )


def part(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("name", sorted(BELOW))
def test_no_import_goes_up(name):
    for path in ROOT.rglob("*.py"):
        if part(path) == name:
            above = imported(path.read_text()) - BELOW[name] - {name, "types"}
            assert not above, f"{path} imports {sorted(above)}"


def test_every_part_has_a_floor():
    assert {part(path) for path in ROOT.rglob("*.py")} == set(BELOW)
    order = list(BELOW)
    for name, below in BELOW.items():
        assert all(order.index(b) < order.index(name) for b in below), "no circles"


def test_the_core_reads_in_one_sitting():
    sizes = {path.name: code(path.read_text()) for path in (ROOT / "core").glob("*.py")}
    assert sum(sizes.values()) <= CORE, sizes
    assert max(sizes.values()) <= FILE, sizes


@pytest.mark.parametrize("folder", ["jlora", "experiments", "benchmarks"])
def test_no_file_is_long(folder):
    files = {p.relative_to(ROOT.parent).as_posix(): p for p in (ROOT.parent / folder).rglob("*.py")}
    long = {name for name, p in files.items() if len(p.read_text().splitlines()) > LONG}
    assert long == {name for name in LONGER if name.startswith(folder)}


def test_the_guide_to_the_core_names_every_file_and_its_size():
    guide = (ROOT.parent / "docs" / "core.md").read_text()
    said = {name: int(n) for name, n in re.findall(r"^\| `(\w+\.py)` .* \| (\d+) \|$", guide, re.M)}
    sizes = {path.name: code(path.read_text()) for path in (ROOT / "core").glob("[a-z]*.py")}
    assert said == sizes


def test_it_would_be_noticed():
    assert imported("import jax\nfrom jlora.io import peft\nimport jlora.core.lift as l") == {
        "io",
        "core",
    }
    assert imported("from jlora import merging") == {"merging"}
    assert code('"""Doc\nstring."""\n\n# why\nx = 1\ndef f():\n    """Doc."""\n    return x\n') == 3


def test_there_is_enough_test_code():
    """Lines that are neither empty nor comment nor docstring, which sources have far more of."""

    def total(*folders):
        paths = [p for folder in folders for p in (ROOT.parent / folder).rglob("*.py")]
        return sum(code(path.read_text(encoding="utf-8")) for path in paths)

    assert total("tests") >= 0.6 * total("jlora", "experiments")

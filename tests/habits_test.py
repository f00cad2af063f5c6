"""Words that a reader of PEFT or optax would have to look up do not come back."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPEN: tuple[str, ...] = ()
EACH = r"site|step|token|axis|primitive|stage|layer|task|epoch|leaf|channel|slice|client"
HABITS = {  # what is not said -> what is
    rf"\b(?:one|two|three|\d+) (?!(?:without|for|of|with|in|at|by|from|to|on|is|than|has|as|where|"
    rf"takes|gives)\b)"
    rf"[a-z]+ an? (?:{EACH})\b": "per: 'one token per site'",
    r"\bour reading\b": "'Original to jlora', once per file, or Deviates",
    r"\bowe[sd]?\b": "required",
    r"\btold\b(?! (?:apart|from|by))": "given, declared, expressed as",
    r"\bbeside\b": "separate from, alongside",
    r"\blooked-up table\b": "embedding table",
    r"\blengths? by (?:input|row)": "magnitudes per input feature",
    r"\b(?:strangers|from strangers)\b": "untrusted",
    r"\bgoes on where\b": "resumes",
    r"\bis no (?:valid )?(?:regular expression|JSON|method|site)\b": "is not a valid ...",
    r"\bsuperfluous\b": "unexpected",
    r"\bpeel(?:s|ed)?\b": "unstack",
    r"\bHASTY\b|\bhasty\b": "fast_compile",
    r"\bwithout a word\b": "silently",
    r"\b[Aa] rule a primitive\b": "one rule per primitive",
    r"\bone char an axis\b": "one character per axis",
}


NAMES = {
    "made",
    "found",
    "told",
    "two",
    "peel",
    "owed",
}  # of variables: they say nothing of a value
# a claim's record holds for the file as it was run
RUN = ("experiments/claims/",)


def words(path):
    """The prose of a file by line: of a module its comments and strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return list(enumerate(text.splitlines(), 1))
    kinds = {
        tokenize.COMMENT,
        tokenize.STRING,
        getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.start[0], " ".join(t.string.split())) for t in tokens if t.type in kinds]


def found(lines):
    for number, line in lines:
        for habit, better in HABITS.items():
            if match := re.search(habit, line):
                yield f"{number}: {match[0]!r}: say {better}"


def files():
    paths = [ROOT / "README.md", ROOT / "WORKSPACE.md", *(ROOT / "docs").rglob("*.md")]
    for folder in ("jlora", "experiments", "benchmarks"):
        paths += (ROOT / folder).rglob("*.py")
    # what describes a data set is input of models, kept word for word
    skipped = ("experiments/data/descriptions", "experiments/data/glue.py", "docs/results")
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(skipped + OPEN):
            yield path


def test_habits_do_not_come_back():
    wrong = [f"{path}:{line}" for path in files() for line in found(words(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    ["the bases and two vectors a site.", "the reference is owed", "expected one beside it",
     "Source: our reading.", "x is no regular expression"],
)  # fmt: skip
def test_it_would_be_noticed(line):
    assert list(found([(1, line)]))
    assert not list(found([(1, "One token per site; layers cannot be told apart by size.")]))


def unexplained(source):
    """Variables of a module whose names say nothing."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        else:
            continue
        if name in NAMES:
            yield f"{node.lineno}: {name}"


def test_variables_say_what_they_hold():
    wrong = [
        f"{path}:{line}"
        for path in files()
        if path.suffix == ".py" and not path.relative_to(ROOT).as_posix().startswith(RUN)
        for line in unexplained(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", ["found = 1", "def f(made): ...", "for two in x: ..."])
def test_a_name_that_says_nothing_would_be_noticed(source):
    assert list(unexplained(source))
    assert not list(unexplained("def two(): return found.made"))

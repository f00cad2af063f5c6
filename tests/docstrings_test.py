"""Every public function says what it takes, gives back and raises, in one form."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jlora"
OPEN: tuple[str, ...] = ()  # rooms and files not in this form yet; the list may only shrink
PASS_ON = {  # what takes keyword arguments to pass them on as they are
    "partial",  # as functools.partial
    "replace",  # as dataclasses.replace
    "one_by_one",  # parameters of any of JAX's primitives
    *("sites", "init"),  # the model's own arguments
}
HEADINGS = r"Args|Returns|Yields|Raises|Reference|References|Deviates|Example"
SHAPED = r"\b(?:Float|Float32|Int|Int32|UInt|UInt8|Bool|Num|Real|Inexact|Shaped|Key)\[.*?\"\]"


def sections(doc):
    """{heading: its text} of a docstring, the text before the first heading under ""."""
    parts = re.split(rf"^({HEADINGS}):", inspect.cleandoc(doc), flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(text):
    """The names that a section explains, with at least one word on each."""
    first = re.match(r"\n*( +)", text)
    pattern = rf"^{first[1] if first else '  '}(\*{{0,2}}\w[\w, *]*): *\S"
    return {n for names in re.findall(pattern, text, re.M)
            for n in re.split(r", *", names.replace("*", ""))}  # fmt: skip


def pointed(doc, module):
    """The documentation that "Args and Raises are those of `f`" refers to, by heading."""
    found = {}
    for heads, name in re.findall(r"((?:Args|Returns|Yields|Raises)[^.`]*?) (?:is|are) those of "
                                  r"`([\w.]+)`", re.sub(r"\s+", " ", doc)):  # fmt: skip
        target = importlib.import_module("jlora") if name.startswith("jlora.") else module
        for part in name.removeprefix("jlora.").split("."):
            target = getattr(target, part, None)
        there = everything(inspect.getdoc(target) or "", module) if target else {}
        found |= {h: there[h] for h in re.findall(HEADINGS, heads) if h in there}
    return found


def everything(doc, module):
    """{heading: text} of a docstring with what it points to."""
    above, here = pointed(doc, module), sections(doc)
    return {h: f"{here.get(h, '')}\n{above.get(h, '')}" for h in {*above, *here}}


def own(body):
    """The nodes of a function's body without those of functions inside it."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from own(ast.iter_child_nodes(node))


def parameters(node):
    a = node.args
    named = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
    return [x for x in named if x.arg not in ("self", "cls") and not x.arg.startswith("_")]


def raised(node):
    """The names of the exceptions that leave a function and that it raises by itself."""
    caught = set()
    for x in own(node.body):
        if isinstance(x, ast.Try):
            names = {n.id for h in x.handlers if h.type for n in ast.walk(h.type)
                     if isinstance(n, ast.Name)}  # fmt: skip
            caught |= {y for y in own(x.body) if isinstance(y, ast.Raise) and isinstance(
                       y.exc, ast.Call) and ast.unparse(y.exc.func) in names}  # fmt: skip
    for x in own(node.body):
        if x in caught:
            continue
        if isinstance(x, ast.Raise) and isinstance(x.exc, ast.Call):
            name = ast.unparse(x.exc.func).split(".")[-1]
            if name[:1].isupper() and name not in ("NotImplementedError", "SystemExit"):
                yield name


def gives(node):
    """Whether a function returns something."""
    if node.returns is not None:
        return ast.unparse(node.returns) not in ("None", "NoReturn", "Never")
    return any(isinstance(x, ast.Return) and x.value is not None for x in own(node.body))


def function_problems(node, module=None, is_property=False, inherited=()):
    """What a public function lacks.

    `inherited`: the documentation of the methods that it overrides, and of its class. What they say
    holds here too.
    """
    own_doc = ast.get_docstring(node)
    docs = [everything(d, module) for d in (own_doc, *inherited) if d]
    if not docs:
        yield "no docstring"
        return
    known = {h: {n for d in docs for n in entries(d.get(h, ""))} for h in ("Args", "Raises")}
    for arg in parameters(node):
        if arg.arg not in known["Args"]:
            yield f"Args lacks {arg.arg}"
        annotation = ast.unparse(arg.annotation) if arg.annotation else ""
        if re.search(r"\bArray\b", re.sub(SHAPED, "", annotation.replace("'", '"'))):
            yield f"{arg.arg}: {annotation} without a shape"
    if node.args.kwarg and node.name not in PASS_ON:
        yield f"**{node.args.kwarg.arg} hides what it takes"
    summary = sections(own_doc)[""].lstrip() if own_doc else ""
    returns = any({"Returns", "Yields"} & {*d} for d in docs) or summary.startswith("Returns ")
    if gives(node) and not is_property and not returns:
        yield "no Returns"
    for name in sorted(set(raised(node)) - known["Raises"]):
        yield f"Raises lacks {name}"


def problems(source, module=None):
    """(line, where, what) of everything public in a file that is not in this form."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.alias) and "Any" in (
            getattr(node, "id", ""), getattr(node, "name", "")):  # fmt: skip
            yield node.lineno, "Any", "say which: a name of jlora.types"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield from ((node.lineno, node.name, p) for p in function_problems(node, module))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.lineno, node.name, "no docstring"
            for f in node.body:
                if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                    names = {ast.unparse(d).split(".")[-1] for d in f.decorator_list}
                    found = function_problems(
                        f, module, bool(names & {"property", "cached_property"}),
                        overridden(module, node.name, f.name),
                    )  # fmt: skip
                    yield from ((f.lineno, f"{node.name}.{f.name}", p) for p in found)


def overridden(module, cls, name):
    """The documentation of the methods that `cls.name` overrides, and of the class."""
    if module is None:
        return ()
    kind = getattr(module, cls)
    docs = [vars(b)[name].__doc__ for b in kind.__mro__[1:] if name in vars(b)]
    return (*(inspect.cleandoc(d) for d in docs if d), _raises(kind))


def _raises(kind):
    """The part of a class's documentation that its methods share: what is refused, and where."""
    text = sections(kind.__doc__ or "").get("Raises")
    return f".\n\nRaises:{text}" if text else ""


def files():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if not any(p.startswith("_") and p != "__init__.py" for p in parts):
            yield path


def converted(path):
    name = path.relative_to(ROOT).as_posix()
    return name != "types.py" and not any(name == o or name.startswith(f"{o}/") for o in OPEN)


def found(path):
    name = path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".")
    module = importlib.import_module(name.removesuffix(".__init__"))
    return [f"{path}:{line} {where}: {what}" for line, where, what in
            problems(path.read_text(), module)]  # fmt: skip


def rooms():
    return sorted({path.relative_to(ROOT).parts[0] for path in files()})


@pytest.mark.parametrize("room", rooms())
def test_everything_public_is_documented_in_one_form(room):
    wrong = [line for path in files() if path.relative_to(ROOT).parts[0] == room
             if converted(path) for line in found(path)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", OPEN)
def test_the_list_of_what_is_open_only_shrinks(name):
    inside = [p for p in files() if p in (ROOT / name, *(ROOT / name).rglob("*.py"))]
    assert inside, f"{name} is gone: remove it from OPEN"
    assert any(found(path) for path in inside), f"{name} is in form: remove it from OPEN"

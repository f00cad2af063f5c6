"""Pages of the site that are made from the registry: one per system, and the table of all.

A MkDocs hook; nothing is written into the repository. A page holds what the system's own file says
(its module docstring with the equation, as MathML), its record, the laws it breaks, and its claim
with figures and verdict.
"""

import html
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

from jlora import registry
from jlora.system import Placed

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *(?=\n)))*)", re.M)
INLINE = re.compile(r":math:`([^`]+)`", re.S)
SECTION = re.compile(
    r"^(Args|Returns|Raises|Attributes|Reference|References|Paper|Source|Deviates|Symbols):(.*)$",
    re.M,
)
LINK = re.compile(r"`([^`<]+) <(https?://[^>]+)>`_+", re.S)


def on_files(files: Files, config: Any) -> Files:
    """MkDocs calls this with all files; adds the generated ones."""
    for path, text in pages(ROOT).items():
        files.append(File.generated(config, path, content=text))
    return files


def pages(root: Path) -> dict[str, str]:
    """Path of a page below docs/ -> its Markdown."""
    placed = registry.systems()
    out = {f"systems/{slug(p.system.name)}.md": page(p, root) for p in placed}
    return {"systems/index.md": index(root), **out}


def slug(name: str) -> str:
    """A file name for a system."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", " plus")).strip("-")


def math(tex: str, display: bool) -> str:
    """TeX as MathML."""
    mode = "block" if display else "inline"
    return latex2mathml.converter.convert(" ".join(tex.split()), display=mode)


def markdown(docstring: str) -> str:
    """A docstring of this project as Markdown: equations, literal tables, sections."""
    text = inspect.cleandoc(docstring)
    text = BLOCK.sub(lambda m: f"\n\n{math(textwrap.dedent(m[2]).strip(), True)}\n\n", text)
    text = INLINE.sub(lambda m: math(m[1], False), text)
    text = LINK.sub(r"[\1](\2)", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = SECTION.sub(r"\n**\1:**\2\n", text)
    return "\n\n".join(_fenced(block) for block in re.split(r"\n\s*\n", text))


def _fenced(block: str) -> str:
    """A paragraph; literal where it is a table of the docstring."""
    is_table = re.match(r"\s*=+( +=+)+\s*$", block.split("\n")[0]) is not None
    return f"```text\n{block}\n```" if is_table else block


def page(placed: Placed, root: Path) -> str:
    """One system."""
    system, state = placed.system, registry.state(placed, root)
    doc = inspect.getdoc(importlib.import_module(placed.module)) or ""
    rows = ", ".join(map(str, system.rows)) or "no row"
    source = placed.module.replace(".", "/") + ".py"
    lines = [
        f"# {system.name}",
        "",
        "| | |",
        "|---|---|",
        f"| paper | {system.paper} |",
        f"| kind | {system.kind}, {placed.family} |",
        f"| work list | {rows} |",
        f"| state | **{state.name}**{': ' + '; '.join(state.missing) if state.missing else ''} |",
        f"| source | `{source}`, `{system.symbol}` |",
        f"| tests | {', '.join(f'`{t}`' for t in placed.tests)} |",
        f"| measured | {html.escape(system.evidence)} |",
        "",
        markdown(doc),
        "",
    ]
    if system.breaks:
        lines += ["## Laws that it breaks, and why", ""]
        lines += [f"- **{law}**: {why}" for law, why in system.breaks.items()]
    for name in system.claims:
        lines += ["", *claim(name, root)]
    return "\n".join(lines)


def claim(name: str, root: Path) -> list[str]:
    """The section on a claim; [] without one."""
    path = root / registry.RECORDS / f"{name}.json"
    if not name or not path.is_file():
        return []
    r = json.loads(path.read_text(encoding="utf-8"))
    d, c = r["difference"], r["system_minus_control"]
    rows = ((f"minus {r['baseline']}", d), (f"minus control: {r['control']}", c))
    return [
        "## Claim",
        "",
        f"*{r['statement']}* ({r['reference']}): **{r['verdict']}**.",
        "",
        f"| {r['unit']} | difference | 95 % interval |",
        "|---|---|---|",
        *(f"| {n} | {x['mean']:+.4f} | {x['low']:+.4f} to {x['high']:+.4f} |" for n, x in rows),
        "",
        f"{d['n']} units, seeds {', '.join(map(str, r['seeds']))}, {r['seconds']} s; "
        f"`jlora claims {name}` repeats it.",
    ]


def index(root: Path) -> str:
    """The table of all systems, then the absent rows of the work list."""
    work = registry.work_list(root)
    lines = [
        "# Systems",
        "",
        "Every system has a page: its equation, where the code deviates from the paper, its tests, "
        "and its claim on real data.",
        "",
        "| system | family | kind | row | state | paper |",
        "|---|---|---|---|---|---|",
    ]
    for p in registry.systems():
        s, state = p.system, registry.state(p, root)
        rows = ", ".join(map(str, s.rows))
        link = f"[{s.name}]({slug(s.name)}.md)"
        lines.append(f"| {link} | {p.family} | {s.kind} | {rows} | {state.name} | {s.paper} |")
    absent = [r.row for r in work if not r.systems]
    lines += ["", f"Not here yet, of the {len(work)} rows of the work list: "
              + ", ".join(f"{r.name} ({r.number})" for r in absent) + "."]  # fmt: skip
    return "\n".join(lines)

"""`jlora systems`: every system with its state, and the rows of the work list.

jlora systems                 the rows of the work list that are served, and a count by state
jlora systems --all           every system and every row, absent ones too
jlora systems dora merging    only lines that contain one of the words
jlora systems --json          the same for programs
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence

from jlora import registry
from jlora.types import Dynamic


def entries() -> list[dict[str, Dynamic]]:
    """One entry per system, then one per row of the work list that no system serves.

    Returns:
      Dictionaries for JSON.
    """
    root = registry.checkout()
    rows = registry.work_list(root)
    out = []
    for placed in registry.systems():
        system, state = placed.system, registry.state(placed, root)
        out.append(
            {
                "name": system.name,
                "rows": list(system.rows),
                "family": placed.family,
                "kind": system.kind,
                "paper": system.paper,
                "module": placed.module,
                "tests": list(placed.tests),
                "claim": system.claim or None,
                "more_claims": list(system.more_claims),
                "state": state.name,
                "missing": list(state.missing),
                "evidence": system.evidence,
                "breaks": dict(system.breaks),
            }
        )
    for r in rows:
        if not r.systems:
            absent = {"name": r.row.name, "rows": [r.row.number], "kind": r.row.kind}
            out.append({**absent, "state": "absent", "module": None, "missing": []})
    return out


def counted() -> dict[str, int]:
    """How many rows of the work list are in each state.

    Returns:
      {state: count}, the most frequent first.
    """
    rows = registry.work_list(registry.checkout())
    return dict(Counter(r.state.name for r in rows).most_common())


def table(chosen: Sequence[dict[str, Dynamic]]) -> str:
    """The entries as text.

    Args:
      chosen: of `entries`.

    Returns:
      A line for each.
    """
    head = ("system", "row", "family", "kind", "state", "paper", "what is missing")
    lines = [
        (
            e["name"],
            ",".join(map(str, e["rows"])),
            e.get("family", ""),
            e["kind"],
            e["state"],
            e.get("paper", ""),
            "; ".join(e["missing"]),
        )
        for e in chosen
    ]
    width = [max(len(line[k]) for line in (head, *lines)) for k in range(len(head) - 1)]
    rule = tuple("-" * w for w in (*width, len(head[-1])))
    return "\n".join(
        "  ".join(
            [*(c.ljust(w) for c, w in zip(line, width, strict=False)), line[-1]]
        ).rstrip()
        for line in (head, rule, *lines)
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora systems`; None: those of the process.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(prog="jlora systems", description="systems and their state")
    parser.add_argument("words", nargs="*", help="only lines that contain one of these words")
    parser.add_argument("--all", action="store_true", help="absent rows of the work list too")
    parser.add_argument("--json", action="store_true", help="for programs: all entries as JSON")
    args = parser.parse_args(argv)
    everything = entries()
    chosen = [e for e in everything if args.all or args.json or e["state"] != "absent"]
    if args.words:
        words = [w.lower() for w in args.words]
        chosen = [e for e in everything if any(w in json.dumps(e).lower() for w in words)]
    if args.json:
        print(json.dumps({"work_list": counted(), "systems": chosen}, indent=2))
    else:
        counts = ", ".join(f"{n} {name}" for name, n in counted().items())
        print(table(chosen))
        print(f"\n{len(chosen)} of {len(everything)} entries; the work list's 97 rows: {counts}")
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main())

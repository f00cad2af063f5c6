"""`python -m jlora.systems` prints the table of all systems, or the rows that contain its words."""

import sys

from jlora import registry


def main(words: list[str]) -> int:
    """Prints the table; with `words`, only rows that contain one of them, any case."""
    head, rule, *rows = registry.table().splitlines()
    kept = [r for r in rows if not words or any(w.lower() in r.lower() for w in words)]
    print("\n".join([head, rule, *kept, "", f"{len(kept)} of {len(rows)} systems"]))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

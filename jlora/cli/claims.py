"""`jlora claims`: run the claim of a system and keep its record.

    jlora claims                      every claim with its verdict; stale records are marked
    jlora claims do_merging           run one, at least three seeds, and write its record
    jlora claims --all                renew every record
    jlora claims do_merging --dry_run figures only; nothing is written

Claims run in a checkout: the claim files are in ``experiments/claims``, the records go
to ``docs/results/claims``. Base models and corpora are pinned packages, downloaded once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from jlora import registry
from jlora.io.json_file import read_json
from jlora.types import Dynamic


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora claims`; None: those of the process.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    parser = argparse.ArgumentParser(
        "jlora claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="claims to run; without one: list all")
    parser.add_argument("--all", action="store_true", help="run every claim")
    parser.add_argument("--seeds", default="0,1,2", help="at least three, with commas")
    parser.add_argument("--workdir", type=Path, default=Path("runs/claims"))
    parser.add_argument("--dry_run", action="store_true", help="write no record")
    args = parser.parse_args(argv)
    root = registry.checkout()
    try:
        if root is None:
            raise ValueError("claims run in a checkout of the repository; this is an installation")
        runner = importlib.import_module("experiments.claims.runner")
        names = runner.names() if args.all else tuple(args.names)
        if not names:
            print(listed(runner, root))
            return 0
        seeds = [int(s) for s in args.seeds.split(",")]
        for claim in [runner.load(name) for name in names]:
            record = runner.measure(claim, seeds, args.workdir)
            print(runner.summary(record))
            if not args.dry_run:
                print(f"  kept in {runner.keep(record, root / registry.RECORDS)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def listed(runner: Dynamic, root: Path) -> str:
    """A line per claim: verdict and age of its record.

    Args:
      runner: the module `experiments.claims.runner`.
      root: the repository.

    Returns:
      The text.
    """
    lines = []
    for name in runner.names():
        path = root / registry.RECORDS / f"{name}.json"
        if not path.is_file():
            lines.append(f"{name}: has not been run")
            continue
        record = read_json(path)
        files = ", ".join(registry.changed(name, runner.FOLDER.parents[1], record))
        old = f"  ({files}: changed since; run it again)" if files else ""
        lines.append(runner.summary(record) + old)
    return "\n".join(lines) or "no claims"


if __name__ == "__main__":
    sys.exit(main())

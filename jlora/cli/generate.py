"""`jlora generate`: an adapter for a task of one's own, without training.

    jlora generate --task_dir my_task --out adapter
    jlora generate --task_dir my_task --out adapter --generator runs/minilm_generator/generator

The task is a folder with ``task.json`` (names and descriptions of 2 to 20 classes) and ``train``,
``validation`` and ``test`` as ``.jsonl`` or ``.csv``, or a folder of such folders. The first line
says whether the adapter or one of its rivals on the same examples is the one to use. The generator
that comes with the package is of MiniLM-L6, which is downloaded once. ``pip install
'jlora[experiments]'`` brings what it needs.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora generate`; None: those of the process.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    parser = argparse.ArgumentParser(
        "jlora generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task_dir", type=Path, required=True, help="the task, or several")
    parser.add_argument("--out", type=Path, required=True, help="folder that is written")
    parser.add_argument("--generator", type=Path, help="default: the one of the package")
    parser.add_argument(
        "--examples", type=int, default=0, help="most training texts read of a class (default: 16)"
    )
    parser.add_argument("--cache", type=Path, help="default: JLORA_CACHE or ~/.cache/jlora")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    args = parser.parse_args(argv)
    try:
        own_task = importlib.import_module("experiments.generating.own_task")
        assets = importlib.import_module("experiments.data.assets")
        workdir = importlib.import_module("experiments.workdir")
    except ModuleNotFoundError as error:
        print(
            f"error: got no module {error.name!r}, expected pip install 'jlora[experiments]'",
            file=sys.stderr,
        )
        return 2
    generator = args.generator or own_task.checkpoint.SHIPPED
    try:
        shown = own_task.run(
            args.task_dir, args.out, generator, args.examples, args.cache, args.overwrite
        )
    except (workdir.StageError, assets.AssetError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())

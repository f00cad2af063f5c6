"""`jlora finetune`: fine-tune a language model with any adapter of the registry.

    jlora finetune --base=DIR --data=train.jsonl --workdir=runs/mine
    jlora finetune --base=DIR --data=train.jsonl --dry_run
    jlora finetune --helpfull

The program is ``experiments/finetune.py``; ``pip install 'jlora[experiments]'`` brings what it
needs.
"""

import importlib
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora finetune`; None: those of the process.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    try:
        program = importlib.import_module("experiments.finetune")
    except ModuleNotFoundError as error:
        print(
            f"error: got no module {error.name!r}, expected pip install 'jlora[experiments]'",
            file=sys.stderr,
        )
        return 2
    return program.console(list(sys.argv[2:] if argv is None else argv))

"""The console script `jlora`: one word per command, each a module of `jlora.cli`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "merge": ("jlora.cli.merge.main", "merge adapters in files, by a configuration"),
    "convert": ("jlora.cli.convert", "an adapter from one file format to another"),
    "inspect": ("jlora.cli.inspect", "what an adapter or a bank holds, as a table or a plot"),
    "generate": ("jlora.cli.generate", "an adapter for a task of your own, without training"),
    "finetune": ("jlora.cli.finetune", "fine-tune a language model with any adapter"),
    "serve": ("jlora.cli.serve", "serve adapters over one language model, by OpenAI's protocol"),
    "systems": ("jlora.cli.systems", "every system with its state"),
    "claims": ("jlora.cli.claims", "run the claim of a system and keep its record"),
}


def usage() -> str:
    """The commands.

    Returns:
      A line for each.
    """
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: jlora COMMAND [options]", "", *lines, "", "jlora COMMAND --help"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the words after `jlora`; None: those of the process, which then is the command's own
        (`program` of its module, where it has one).

    Returns:
      the exit status: 0, what the command returns, or 2 for an unknown command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"jlora: got {words[0]!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[words[0]][0])
    run = getattr(module, "program", module.main) if argv is None else module.main
    return run(words[1:])


if __name__ == "__main__":
    sys.exit(main())

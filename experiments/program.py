"""Flags of a program that are there while it runs, so that importing a program defines none.

Programs have flags of the same names (`--workdir`, `--seed`, `--rank`) with other defaults; absl
keeps all flags of a process in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from absl import app, flags, logging


def run(
    define: Callable[[], None],
    main: Callable[[list[str]], None],
    argv: Sequence[str] | None = None,
) -> None:
    """Run a program; ends the process as `absl.app.run` does, by SystemExit.

    Args:
      define: defines its flags.
      main: the program, given what is left of the command line.
      argv: the command line; None: that of the process.
    """
    app.define_help_flags()  # absl's own, once per process: they stay
    # The checkpointer's INFO lines would bury the bars; -v=0 (or --verbosity=0) shows them.
    flags.FLAGS.verbosity = logging.WARNING
    kept = set(flags.FLAGS)
    define()
    try:
        app.run(main, argv=None if argv is None else list(argv))
    finally:
        for name in set(flags.FLAGS) - kept:
            delattr(flags.FLAGS, name)

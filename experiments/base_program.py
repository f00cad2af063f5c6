"""What the programs that train a base have in common: flags, one line per failure, the card."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import config as config_lib
from experiments.data.assets import AssetError
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags(settings: type, workdir: str) -> None:
    """Define the flags of a program.

    Args:
      settings: dataclass of `config.setting` fields, a flag each.
      workdir: the default.
    """
    flags.DEFINE_string("workdir", workdir, "everything the run writes")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    flags.DEFINE_bool("dry_run", False, "state what the run will take, and end")
    config_lib.define_flags(settings)


def main(argv: list[str], from_flags: Callable[[Any], Any], module: str) -> None:
    """Entry point: every expected failure is one clear line and exit code 2.

    Args:
      argv: what is left of the command line.
      from_flags: the settings of parsed flags.
      module: name of the run's module, with `dry`, `run` and `lines`; imported here, so that --help
        does not wait for JAX.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    run, workdir = importlib.import_module(module), Path(FLAGS.workdir)
    try:
        settings = from_flags(FLAGS)
        if FLAGS.dry_run:
            print("\n".join(run.dry(settings)))
            return
        card = run.run(settings, workdir, Path(FLAGS.cache) if FLAGS.cache else None)
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        print("\n".join(run.lines(card, workdir)))


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    sys.exit(2)

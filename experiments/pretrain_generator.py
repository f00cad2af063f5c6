"""Make a generator of adapters: what a closed form needs to know of a base and of many tasks.

    python -m experiments.pretrain_generator --flagfile=experiments/flags/minilm_generator.flags

It reads the seen tasks of `--tasks` and is measured on the held-out ones, against what a user could
do with the same examples. The result is a folder (safetensors, config.json, a card) that
`jlora generate` reads. Kill it whenever you like: the same command resumes. Of the settings below,
those of `data` and of `zoo` (for LoRA trained on the examples) are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from experiments import config as config_lib
from experiments import program
from experiments.data.assets import AssetError
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("workdir", "runs/minilm_generator", "everything the run writes")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    flags.DEFINE_bool("lora", True, "train LoRA on the examples too, a rival of the card")
    flags.DEFINE_integer("measured", 0, "tasks of a held-out level in the card (0: all)", 0)
    config_lib.define_flags()


def main(argv: list[str]) -> None:
    """Entry point: every expected failure is one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.cond_pdiff import compile_settings
    from experiments.generating import card, run  # --help should not wait for JAX

    workdir = Path(FLAGS.workdir)
    try:
        config = config_lib.from_flags(FLAGS)
        workdir.mkdir(parents=True, exist_ok=True)
        compile_settings(workdir, False)
        cache = Path(FLAGS.cache) if FLAGS.cache else None
        measured = run.run(config, workdir, cache, FLAGS.lora, FLAGS.measured)
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        print("\n".join([*card.table(measured), "", f"Generator: {workdir / run.RESULT}"]))


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    program.run(define_flags, main)

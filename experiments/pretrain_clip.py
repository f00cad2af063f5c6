"""Train a tiny CLIP on pinned emoji and frozen text embeddings: base C of the claims.

    python -m experiments.pretrain_clip --flagfile=experiments/flags/base_c.flags

The result is a directory with float16 safetensors, config.json, the embeddings of all names,
examples and a card that says how good it is. Kill it whenever you like: the same command resumes,
and raised `--steps` continue the run. `--dry_run` says what it will take.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from experiments import config as config_lib
from experiments import program
from experiments.clip.settings import Settings, from_flags
from experiments.data.assets import AssetError
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("workdir", "runs/base_c", "everything the run writes")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    flags.DEFINE_bool("dry_run", False, "state parameters and arithmetic, and end")
    config_lib.define_flags(Settings)


def main(argv: list[str]) -> None:
    """Entry point: every expected failure is one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.clip import run  # --help should not wait for JAX

    workdir = Path(FLAGS.workdir)
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


if __name__ == "__main__":
    program.run(define_flags, main)

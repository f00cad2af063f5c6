"""Fine-tune one language model for many tasks at once, in packed steps.

    python -m experiments.tune_many --jobs=jobs.yaml --workdir=runs/many

The file lists the jobs (`experiments/tuning/jobs_file.py`); each has its own data, rank, learning
rate and number of steps, and becomes the LoRA adapter that it would become alone: a PEFT directory
and an Orbax checkpoint in a folder of its name. Kill it whenever you like: the same command
resumes. `--dry_run` shows the plan.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from experiments import program
from experiments.data.assets import AssetError
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("jobs", "", "the YAML file of the jobs")
    flags.DEFINE_string("workdir", "runs/many", "everything the run writes")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    flags.DEFINE_bool("dry_run", False, "show the plan, and end")


def main(argv: list[str]) -> None:
    """Entry point: every expected failure is one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.finetuning.run import compile_settings  # --help should not wait for JAX
    from experiments.tuning import jobs_file, run

    workdir = Path(FLAGS.workdir)
    try:
        if not FLAGS.jobs:
            raise ValueError("jobs: got '', expected the path of a YAML file")
        work = run.prepare(jobs_file.read(FLAGS.jobs), Path(FLAGS.cache) if FLAGS.cache else None)
        if FLAGS.dry_run:
            print("\n".join(run.describe(work)))
            return
        workdir.mkdir(parents=True, exist_ok=True)
        compile_settings(workdir)
        report = run.run(work, workdir)
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        print("\n".join(run.lines(report, workdir)))


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    program.run(define_flags, main)

"""Every variant of LoRA on the same real tasks: learning rate, rank and seed swept alike.

    python -m experiments.variants --flagfile=experiments/flags/variants_full.flags

Trains adapters of attention kernels: of MiniLM's last layer on four text tasks for which frozen
features do not suffice, of base L on four kinds of text that it continues, and of base C on four
kinds of pictures that it was not trained on. Variants are methods, optimizers, initialisations,
schedules and mixtures of experts. Writes report.json, report.md and a plot per base into the
workdir: best and spread of each variant over learning rates, ranks and seeds, with tags on four
axes. Finished cells (a base, a variant, a rank, a seed) are kept; the same command resumes with the
missing ones.
"""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from experiments import program
from experiments.data.assets import AssetError
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("workdir", "runs/variants", "everything the study writes")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    flags.DEFINE_list("bases", ["minilm", "base_l", "base_c"], "base models with their tasks")
    flags.DEFINE_list("variants", [], "their names; none: all")
    flags.DEFINE_list("ranks", ["2", "4", "8"], "ranks of LoRA that set the budgets")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "of starts, random bases and drawn rows")
    rates = ["0.11", "0.33", "1", "3", "9"]
    flags.DEFINE_list("factors", rates, "learning rates, by a variant's middle one")
    flags.DEFINE_integer("steps", 60, "optimizer steps of a run")
    flags.DEFINE_integer("batch", 8, "rows of a step")
    flags.DEFINE_bool("toy", False, "tiny random models and made-up rows; no download")


def main(argv: list[str]) -> None:
    """Entry point: every expected failure is one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.variant_study import bench, cells, report  # --help should not wait for JAX
    from experiments.variant_study.methods import VARIANTS

    workdir = Path(FLAGS.workdir)
    try:
        plan = cells.Plan(
            tuple(FLAGS.bases),
            tuple(FLAGS.variants) or tuple(VARIANTS),
            tuple(int(x) for x in FLAGS.ranks),
            tuple(int(x) for x in FLAGS.seeds),
            tuple(float(x) for x in FLAGS.factors),
            FLAGS.steps,
            FLAGS.batch,
        )
        plan.check()
        workdir.mkdir(parents=True, exist_ok=True)
        cache = Path(FLAGS.cache) if FLAGS.cache else None
        cells_of_tasks, tasks = [], {}
        for name in plan.bases:
            one = bench.load(name, workdir, cache, FLAGS.toy)
            cells_of_tasks += cells.sweep(one, plan, workdir)
            tasks[name] = one.names
        summary = report.summarise(cells_of_tasks, tasks)
        summary["command"] = shlex.join(["python", "-m", "experiments.variants", *sys.argv[1:]])
        summary["plan"] = plan._asdict() | {"jax": version("jax")}
        report.write(summary, cells_of_tasks, workdir)
    except (StageError, AssetError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        print(report.markdown(summary))
        print(f"Report: {workdir / 'report.md'}")


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    program.run(define_flags, main)

"""Generate LoRA adapters of picture styles on base D from a few pictures of the style.

    python -m experiments.style_pdiff --flagfile=experiments/flags/style_quick.flags

Stages, in order: `data` (styles), `zoo` (adapters of all styles), `generate` (generators and their
rivals), `evaluate` (flow loss of held-out pictures), `sample` (pictures, Fréchet distances),
`report`. Each is kept in the workdir under a hash of its settings, skipped when it is there and
resumed when it was killed. It needs base D: `python -m experiments.pretrain_pictures` trains it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import config as config_lib
from experiments import pipeline, program
from experiments.data.assets import AssetError
from experiments.styles.settings import STAGES, Settings, from_flags
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("workdir", "runs/style_pdiff", "everything the run writes")
    flags.DEFINE_list("stage", list(STAGES), f"stages to run, out of {', '.join(STAGES)}")
    flags.DEFINE_bool("fast_compile", False, "compile in less time, run slower: for tiny runs")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    config_lib.define_flags(Settings)


def stages() -> tuple[pipeline.Stage, ...]:
    """All stages in order. Imported on the call: --help should not wait for JAX."""
    from experiments.styles import evaluate, generate, pictures, report, sample, zoo

    order = (pictures, zoo, generate, evaluate, sample, report)
    return tuple(module.STAGE for module in order)


def main(argv: list[str]) -> None:
    """Entry point: every expected failure is one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.cond_pdiff import compile_settings

    workdir = Path(FLAGS.workdir)
    try:
        settings: Any = from_flags(FLAGS)
        unknown = [s for s in FLAGS.stage if s not in STAGES]
        if unknown or not FLAGS.stage:
            raise ValueError(
                f"--stage={','.join(FLAGS.stage)}: expected some of {', '.join(STAGES)}"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        compile_settings(workdir, FLAGS.fast_compile)  # before JAX starts its backend
        command = shlex.join(["python", "-m", "experiments.style_pdiff", *sys.argv[1:]])
        cache = Path(FLAGS.cache) if FLAGS.cache else None
        context = pipeline.Context(settings, workdir, cache, command=command)
        products = pipeline.run(stages(), FLAGS.stage, context).products
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        if products.get("report"):
            from experiments.styles import report

            print("\n".join(report.lines(products["report"], workdir)))


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    program.run(define_flags, main)

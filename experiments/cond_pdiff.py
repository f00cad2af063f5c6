"""Generate LoRA adapters of a real encoder from a description of the task.

    python -m experiments.cond_pdiff --flagfile=experiments/flags/text_quick.flags

Stages, in order: `data` (base states of all texts), `zoo` (train adapters of many tasks), `codec`
(adapters -> latents), `rivals` (what the same texts give without a generator), `denoiser` (a
conditional flow, and the paper's DDPM), `sample`, `evaluate`, `more_steps` (generated adapters as a
start of training), `episodes` (a generator in closed form over a shared adapter), `layered` (the
generator that `jlora generate` ships, fitted on this run's tasks), `report`. Each is kept in the
workdir under a hash of its settings, skipped when it is there and resumed when it was killed.
`--stage` runs some of them.

With `--task_dir=DIR --stage=sample,evaluate` on a finished workdir, tasks of your own (2 to 20
classes, single texts or pairs) get generated adapters from their descriptions and a few examples,
scored and saved as PEFT.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import config as config_lib
from experiments import pipeline, processes, program
from experiments.config import STAGES
from experiments.data.assets import AssetError
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("workdir", "runs/cond_pdiff", "everything the run writes")
    flags.DEFINE_list("stage", list(STAGES), f"stages to run, out of {', '.join(STAGES)}")
    flags.DEFINE_bool("fast_compile", False, "compile in less time, run slower: for tiny runs")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    processes.define_flags()
    config_lib.define_flags()


def stages() -> tuple[pipeline.Stage, ...]:
    """All stages in order. Imported on the call: --help should not wait for JAX."""
    from experiments.stages import (
        codec,
        denoiser,
        episodes,
        evaluate,
        layered_stage,
        more_steps,
        report,
        rivals,
        sample,
        world,
        zoo,
    )

    order = (
        world, zoo, codec, rivals, denoiser, sample, evaluate, more_steps, episodes, layered_stage,
        report,
    )  # fmt: skip
    return tuple(module.STAGE for module in order)


def user_tasks_of(context: pipeline.Context) -> None:
    """Generated adapters for the user's tasks on a finished workdir; prints the result."""
    from experiments.stages import rivals, user_tasks

    finished = dataclasses.replace(context, config=dataclasses.replace(context.config, task_dir=""))
    needed = [stage for stage in stages() if stage.name in ("data", "zoo", "codec", "denoiser")]
    loaded = pipeline.load(needed, finished)
    products = loaded.add("rivals", rivals.STAGE.run(loaded)).products  # older runs have none
    result = user_tasks.run(dataclasses.replace(context, products=products))
    for task, scores in result.items():
        print("\n".join(user_tasks.lines(task, scores)))
    print(f"\nAdapters: {context.workdir / 'user'}")


def compile_settings(workdir: Path, fast: bool) -> None:
    """Compiled programs are kept in the workdir, so that a resumed run does not compile again."""
    import jax

    if fast:
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    # The paths of XLA's own caches would be part of every key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def show(report: dict[str, Any], workdir: Path) -> None:
    """The report in a few lines on standard output."""
    from experiments.report import more_steps, names, words

    wide = max(len(method.label) for method in names.METHODS)
    print("\nAccuracy on seen tasks, mean over tasks")
    for key in names.keys(names.SEEN):
        print(f"  {names.method(key).label:{wide}s} {100 * report['summary'][key]['mean']:5.1f} %")
    for level, part in report["unseen"].items():
        count = len(part["table"])
        print(f"{names.level(level)}, {count} task{'s' * (count > 1)}")
        for key in (k for k in names.keys(names.HELD_OUT) if k in part["accuracy"]):
            gap = part["gap_recovered"].get(key)
            share = f"   {100 * gap['mean']:5.1f} % of the gap to training" if gap else ""
            mean = 100 * part["accuracy"][key]["mean"]
            print(f"  {names.method(key).label:{wide}s} {mean:5.1f} %{share}")
        print(f"  = {words.against_best(part)}")
        if "more_steps" in report and level in report["more_steps"]["levels"]:
            print(f"  = {more_steps.sentence(report['more_steps'], level)}")
    print()
    for claim in report["claims"]:
        print(f"[{claim['verdict']}] {claim['text']}")
    print(f"\nReport: {workdir / 'report.html'}")


def main(argv: list[str]) -> None:
    """Entry point: flags to stages, every expected failure one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    workdir = Path(FLAGS.workdir)
    cache = Path(FLAGS.cache) if FLAGS.cache else None
    try:
        config = config_lib.from_flags(FLAGS)
        unknown = [s for s in FLAGS.stage if s not in STAGES]
        if unknown or not FLAGS.stage:
            raise ValueError(
                f"--stage={','.join(FLAGS.stage)}: expected some of {', '.join(STAGES)}"
            )
        config_lib.check_folders(config)
        users = bool(config.task_dir) and set(FLAGS.stage) <= {"sample", "evaluate"}
        workdir.mkdir(parents=True, exist_ok=True)
        compile_settings(workdir, FLAGS.fast_compile)  # before JAX starts its backend
        team = _join(users)
        settings = dataclasses.asdict(config) | {"stage": FLAGS.stage, "jax": version("jax")}
        processes.check(team, settings, workdir)
        command = shlex.join(["python", "-m", "experiments.cond_pdiff", *sys.argv[1:]])
        context = pipeline.Context(config, workdir, cache, team, command=command)
        if users:
            user_tasks_of(context)
            return
        products = pipeline.run(stages(), FLAGS.stage, context).products
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        if products.get("report"):
            show(products["report"], workdir)


def _join(users: bool) -> processes.Processes:
    """This process's place among those that share the run."""
    if FLAGS.distributed and users:
        raise ValueError("distributed: got true, expected false: users' tasks take one process")
    return processes.from_flags(FLAGS)


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    if FLAGS.distributed:
        os._exit(2)  # at exit JAX would wait for the others, which wait for this process
    sys.exit(2)


if __name__ == "__main__":
    program.run(define_flags, main)

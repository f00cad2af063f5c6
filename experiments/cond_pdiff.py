"""Generate LoRA adapters of a real encoder from a description of the task.

    python -m experiments.cond_pdiff --flagfile=experiments/flags/text_quick.flags

Stages, in order: `data` (base states of all texts), `zoo` (train adapters of many tasks), `codec`
(adapters -> latents), `denoiser` (our conditional flow, and the paper's DDPM), `sample`,
`evaluate`, `report`. Each is kept in the workdir under a hash of its settings, skipped when it is
there and resumed when it was killed. `--stage` runs some of them.

With `--task_dir=DIR --stage=sample,evaluate` on a finished workdir, tasks of your own get generated
adapters from their descriptions and a few examples, scored and saved as PEFT.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from experiments import config as config_lib
from experiments.config import STAGES, Config
from experiments.data.assets import AssetError
from experiments.workdir import Stage, StageError, explain_failed_write, read_json, write_json

WORKDIR = flags.DEFINE_string("workdir", "runs/cond_pdiff", "everything the run writes")
STAGE = flags.DEFINE_list("stage", list(STAGES), f"stages to run, out of {', '.join(STAGES)}")
FAST_COMPILE = flags.DEFINE_bool(
    "fast_compile", False, "compile in less time, run slower: for tiny runs"
)
CACHE = flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
config_lib.define_flags()


def pipeline(
    config: Config, workdir: Path, stages: list[str], cache: Path | None, command: str
) -> dict[str, Any] | None:
    """Run the stages; returns the report if the last one ran."""
    # Imported here: --help should not wait for JAX.
    from experiments.stages import codec, denoiser, evaluate, report, sample, world, zoo

    times = _Times(workdir)
    times.all()  # a damaged file is found now, not after the first stage
    last = max(STAGES.index(s) for s in stages)
    with times.of("data"):
        made = world.build(config, workdir, cache)
    times.say("data", world.describe(made))
    if last == STAGES.index("data"):
        return None
    with times.of("zoo"):
        _run_or_need(stages, "zoo", Stage(workdir, "zoo", config.key("zoo")))
        zoo.run(made, workdir)
        adapters = zoo.read(made, workdir)
    times.say("zoo", zoo.describe(adapters))
    if last == STAGES.index("zoo"):
        return None
    with times.of("codec"):
        _run_or_need(stages, "codec", Stage(workdir, "codec", config.key("codec")))
        coded = codec.run(made, adapters, workdir)
    times.say("codec", codec.describe(coded))
    if last == STAGES.index("codec"):
        return None
    with times.of("denoiser"):
        _run_or_need(stages, "denoiser", Stage(workdir, "denoiser", config.key("denoiser")))
        trained = denoiser.run(made, coded, workdir)
    times.say("denoiser", denoiser.describe(trained))
    if last == STAGES.index("denoiser"):
        return None
    with times.of("sample"):
        _run_or_need(stages, "sample", Stage(workdir, "sample", config.key("sample")))
        draws = sample.run(made, coded, trained, workdir)
    times.say("sample", sample.describe(draws))
    if last == STAGES.index("sample"):
        return None
    with times.of("evaluate"):
        _run_or_need(stages, "evaluate", Stage(workdir, "evaluate", config.key("evaluate")))
        found = evaluate.run(made, adapters, coded, trained, draws, workdir)
    times.say("evaluate", evaluate.describe(found))
    if last == STAGES.index("evaluate"):
        return None
    return report.run(made, coded, found, workdir, command, times.all())


def user_pipeline(config: Config, workdir: Path, cache: Path | None) -> dict[str, Any]:
    """Generated adapters for the user's tasks on a finished workdir."""
    from experiments.stages import codec, denoiser, user_tasks, world, zoo

    base = dataclasses.replace(config, task_dir="")
    for name in ("data", "zoo", "codec", "denoiser"):
        Stage(workdir, name, base.key(name)).verify()
    made = world.build(base, workdir, cache)
    adapters = zoo.read(made, workdir)
    coded = codec.run(made, adapters, workdir)
    trained = denoiser.run(made, coded, workdir)
    return user_tasks.run(made, config, adapters, coded, trained, workdir, cache)


def _run_or_need(stages: list[str], name: str, stage: Stage) -> None:
    if name not in stages and not stage.done:
        raise StageError(
            f"{stage.path}: stage '{name}' is needed and not finished; add it to --stage"
        )


class _Times:
    """Seconds of each stage, added up over restarts in <workdir>/times.json."""

    def __init__(self, workdir: Path):
        self.path = workdir / "times.json"

    def all(self) -> dict[str, float]:
        if not self.path.is_file():
            return {}
        known = read_json(self.path, dict, "delete it: only seconds are lost")
        bad = {k: v for k, v in known.items() if not isinstance(v, int | float)}
        if bad:
            raise StageError(f"{self.path}: got {bad}, expected seconds; delete it")
        return known

    def of(self, name: str) -> _Timer:
        return _Timer(self, name)

    def say(self, name: str, found: str) -> None:
        """One line on stderr, below the stage's bar: what it found, and its seconds."""
        print(f"{name:>10}: {found} ({self.all()[name]:.0f} s)", file=sys.stderr, flush=True)


class _Timer:
    def __init__(self, times: _Times, name: str):
        self.times, self.name = times, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        known = self.times.all()
        known[self.name] = round(known.get(self.name, 0.0) + time.monotonic() - self.start, 1)
        write_json(self.times.path, known)


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
    print("\nSeen tasks (mean over tasks):")
    for key, cell in report["summary"].items():
        print(f"  {key:16s} {100 * cell['mean']:5.1f} %")
    for level, part in report["unseen"].items():
        print(f"{level}:")
        for key, cell in part["accuracy"].items():
            gap = part["gap_recovered"].get(key)
            share = f"   {100 * gap['mean']:5.1f} % of the gap" if gap else ""
            print(f"  {key:16s} {100 * cell['mean']:5.1f} %{share}")
    for claim in report["claims"]:
        print(f"[{claim['verdict']}] {claim['text']}")
    print(f"\nReport: {workdir / 'report.html'}")


def main(argv: list[str]) -> None:
    """Entry point: flags to stages, every expected failure one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    workdir = Path(WORKDIR.value)
    cache = Path(CACHE.value) if CACHE.value else None
    try:
        config = config_lib.from_flags(flags.FLAGS)
        unknown = [s for s in STAGE.value if s not in STAGES]
        if unknown or not STAGE.value:
            raise ValueError(
                f"--stage={','.join(STAGE.value)}: expected some of {', '.join(STAGES)}"
            )
        config_lib.check_folders(config)
        workdir.mkdir(parents=True, exist_ok=True)
        compile_settings(workdir, FAST_COMPILE.value)
        if config.task_dir and set(STAGE.value) <= {"sample", "evaluate"}:
            from experiments.stages import user_tasks

            for task, scores in user_pipeline(config, workdir, cache).items():
                print("\n".join(user_tasks.lines(task, scores)))
            print(f"\nAdapters: {workdir / 'user'}")
            return
        command = shlex.join(["python", "-m", "experiments.cond_pdiff", *sys.argv[1:]])
        report = pipeline(config, workdir, STAGE.value, cache, command)
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        if report is not None:
            show(report, workdir)


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    # The checkpointer's INFO lines would bury the bars; -v=0 (or --verbosity=0) shows them.
    flags.FLAGS.verbosity = logging.WARNING
    app.run(main)

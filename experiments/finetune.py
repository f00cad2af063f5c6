"""Fine-tune a language model with any adapter of jlora.

    python -m experiments.finetune --flagfile=experiments/flags/smollm_quick.flags
    jlora finetune --base=DIR --data=train.jsonl --eval_data=test.jsonl --workdir=runs/mine

`--base` is a checkpoint directory of Hugging Face (Llama, Mistral, Qwen, SmolLM, Gemma) with its
tokenizer; the data are chat messages or prompts with completions, one per line. The result is a
PEFT directory and an Orbax checkpoint in the workdir, with a report of losses and answers before
and after. Kill it whenever you like: the same command resumes. `--dry_run` says what it will take.
Several hosts: the same command on each, with `--distributed` and --fsdp x --tensor = all devices.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from experiments import config as config_lib
from experiments import processes, program
from experiments.data.assets import AssetError
from experiments.finetuning.settings import Settings, from_flags
from experiments.workdir import StageError, explain_failed_write

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_string("workdir", "runs/finetune", "everything the run writes")
    flags.DEFINE_string("cache", "", "asset cache (default: JLORA_CACHE or ~/.cache/jlora)")
    flags.DEFINE_bool("dry_run", False, "state parameters, steps and memory, and end")
    processes.define_flags()
    config_lib.define_flags(Settings)


def main(argv: list[str]) -> None:
    """Entry point: every expected failure is one clear line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.finetuning import run  # --help should not wait for JAX

    workdir = Path(FLAGS.workdir)
    try:
        settings = from_flags(FLAGS)
        team = processes.from_flags(FLAGS)
        plan = run.plan(settings, Path(FLAGS.cache) if FLAGS.cache else None)
        if FLAGS.dry_run:
            print("\n".join(run.dry(plan)))
            return
        workdir.mkdir(parents=True, exist_ok=True)
        processes.check(team, dataclasses.asdict(settings) | {"jax": version("jax")}, workdir)
        run.compile_settings(workdir)
        report = run.run(plan, workdir, team)
    except (StageError, AssetError, FloatingPointError) as error:
        _fail(str(error))
    except (OSError, ValueError) as error:
        _fail(explain_failed_write(error, workdir) or str(error))
    else:
        if team.first:
            print("\n".join(run.lines(report, workdir)))


def _fail(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)
    if FLAGS.distributed:
        os._exit(2)  # at exit JAX would wait for the others, which wait for this process
    sys.exit(2)


def console(words: list[str]) -> int:
    """The command `jlora finetune`.

    Args:
      words: its flags.
    """
    try:
        program.run(define_flags, main, ["jlora finetune", *words])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


if __name__ == "__main__":
    program.run(define_flags, main)

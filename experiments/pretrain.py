"""Train a small decoder on pinned real text: base L of the claims.

    python -m experiments.pretrain --flagfile=experiments/flags/base_l.flags

The result is a checkpoint directory in the form of Hugging Face (float16 safetensors, config.json,
tokenizer.json) with a card that says how good it is. Kill it whenever you like: the same command
resumes, and raised `--steps` continue the run. `--dry_run` says what it will take.
"""

from __future__ import annotations

from experiments import base_program, program
from experiments.pretraining.settings import Settings, from_flags


def define_flags() -> None:
    """Define the flags of this program."""
    base_program.define_flags(Settings, "runs/base_l")


def main(argv: list[str]) -> None:
    """Entry point."""
    base_program.main(argv, from_flags, "experiments.pretraining.run")


if __name__ == "__main__":
    program.run(define_flags, main)

"""Train a small DiT on pinned pictures with names: base D of the claims.

    python -m experiments.pretrain_pictures --flagfile=experiments/flags/base_d.flags

The result is a directory with float16 safetensors, config.json, the names it knows, the classifier
that measures it, a sheet of samples and a card that says how good it is. Kill it whenever you like:
the same command resumes, and raised `--steps` continue the run. `--dry_run` says what it will take.
"""

from __future__ import annotations

from experiments import base_program, program
from experiments.pictures.settings import Settings, from_flags


def define_flags() -> None:
    """Define the flags of this program."""
    base_program.define_flags(Settings, "runs/base_d")


def main(argv: list[str]) -> None:
    """Entry point."""
    base_program.main(argv, from_flags, "experiments.pictures.run")


if __name__ == "__main__":
    program.run(define_flags, main)

"""`python -m jlora.merge --config merge.yaml`: read, plan, merge, write.

Source: our reading.
Deviates: nothing.
"""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

from jlora import algebra
from jlora.algebra import Deltas
from jlora.cli.merge import config as configs
from jlora.cli.merge import plan as plans
from jlora.cli.merge import read, write
from jlora.cli.merge.base import Base
from jlora.io import FormatError
from jlora.merging.engine.inputs import gather, to_adapter
from jlora.merging.engine.run import check_finite, lookup


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 with a message for what is refused."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m jlora.merge", description=configs.__doc__, formatter_class=raw
    )
    parser.add_argument("--config", type=Path, required=True, help="the YAML file")
    parser.add_argument("--out", type=Path, help="where to write, instead of out.path")
    parser.add_argument("--dry_run", action="store_true", help="print plan and peak memory only")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    args = parser.parse_args(argv)
    if argv is None:  # a program of its own: being terminated cleans up, as an interrupt does
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(args.config, args.out, args.dry_run, args.overwrite)
    except (configs.ConfigError, FormatError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(path: Path, out: Path | None, dry: bool, overwrite: bool) -> None:
    """One merge; ConfigError, FormatError or ValueError for whatever is refused."""
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise configs.ConfigError(f"{path}: not YAML: {error}") from error
    config = configs.parse(data, path.parent)
    target = out or config.out.path
    if target is None:
        raise configs.ConfigError("out.path: lacks; give it there or as --out")
    config = dataclasses.replace(config, out=dataclasses.replace(config.out, path=target))
    row = lookup(config.method)
    if not dry:
        write.recover(target)
    inputs = [path, *(m.path for m in config.models), *([config.base] if config.base else ())]
    write.check_free(target, overwrite, inputs)
    base = Base(config.base) if config.base else None
    if config.out.format == "merged" and base is None:
        raise configs.ConfigError("base_model: lacks; merged weights need one")
    given = gather(read.adapters(config, base), None, missing=config.missing)
    table: write.Changed = {}
    if config.out.format == "merged" and base is not None:
        table = write.changed(base, given.sites, config.names)
    plan = plans.make(config, row, given)
    if dry:
        sizes = plans.memory(plan, given.bank, config.seed)
        if config.out.format == "merged" and base is not None:
            sizes["largest shard, while written"] = base.writing(table, config.out.dtype)
        print(plans.describe(config, plan, given, sizes))
        return
    made: Deltas = {}
    files = len(base.files) if config.out.format == "merged" and base else 1
    with tqdm(total=len(given.sites) + files, desc=row.name, file=sys.stderr) as bar:
        for chunk in plan.chunks:
            part = plans.run_chunk(plan, chunk, given.bank, config.seed)
            if config.out.rank:
                part = algebra.truncate(part, config.out.rank).deltas
            made |= part
            bar.update(len(chunk.paths))
        adapter = to_adapter(made, given.sites)
        check_finite(row.name, made)
        with write.whole(target, overwrite, inputs) as new:
            if config.out.format == "merged" and base is not None:
                write.merged(new, adapter, table, base, config.out.dtype, lambda: _step(bar))
            elif config.out.format == "orbax":
                write.orbax(new, adapter, config.out.dtype)
                bar.update()
            else:
                write.peft(new, adapter, config.names, base, config.out.dtype)
                bar.update()
    print(f"{target}: {config.out.format}, {len(given.sites)} sites by {row.name}")


def _step(bar: tqdm) -> None:
    bar.update()

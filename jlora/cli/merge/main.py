"""`python -m jlora.merge --config merge.yaml`: read, plan, merge, write.

Source: our reading.
Deviates: nothing.
"""

import argparse
import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from jlora.merge_cli import dense, exact, factors
from tqdm import tqdm

from jlora import algebra
from jlora.algebra import Deltas
from jlora.cli.merge import config as configs
from jlora.cli.merge import plan as plans
from jlora.cli.merge import read, write
from jlora.cli.merge.base import Base
from jlora.core.adapter import Adapter
from jlora.io import FormatError
from jlora.merging.engine.inputs import Gathered, gather, to_adapter
from jlora.merging.engine.run import check_finite


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
    config = dense.settled(configs.parse(data, path.parent))
    target = out or config.out.path
    if target is None:
        raise configs.ConfigError("out.path: lacks; give it there or as --out")
    config = dataclasses.replace(config, out=dataclasses.replace(config.out, path=target))
    row = factors.row_of(config.method)
    if not dry:
        write.recover(target)
    write.check_free(target, overwrite)
    base = Base(config.base) if config.base else None
    if dense.applies(config):
        by_tensors(config, base, target, dry, overwrite)
        return
    if config.out.format == "merged" and base is None:
        raise configs.ConfigError("base_model: lacks; merged weights need one")
    given = gather(read.adapters(config, base), None, missing=config.missing)
    table: write.Changed = {}
    if config.out.format == "merged" and base is not None:
        table = write.changed(base, given.sites, config.names)
    plan = plans.make(config, row, given)
    whole = config.out.format == "merged" and plans.uncut(config, plan)
    if dry:
        sizes = {} if whole else plans.memory(plan, given.bank, config.seed)
        if config.out.format == "merged" and base is not None:
            sizes["largest shard, while written"] = base.writing(table, config.out.dtype)
        print(plans.describe(config, plan, given, sizes))
        if not whole:
            print("\n".join(exact.lines(factored(config, plan, given, lambda n: None)[1])))
        return
    files = len(base.files) if config.out.format == "merged" and base else 1
    with tqdm(total=len(given.sites) + files, desc=row.name, file=sys.stderr) as bar:
        if whole:
            found, delta = {}, exact.reader(plan, given.bank, config.seed)
            adapter = Adapter({}, {}, ())
            bar.update(len(given.sites))
        else:
            made, found = factored(config, plan, given, bar.update)
            adapter = to_adapter(made, given.sites)
            check_finite(row.name, made)
            delta = functools.partial(write.delta_of, adapter)
        with write.whole(target, overwrite) as new:
            if config.out.format == "merged" and base is not None:
                change = write.adding(delta, table)
                write.merged(new, change, table, base, config.out.dtype, lambda: _step(bar))
            elif config.out.format == "orbax":
                write.orbax(new, adapter, config.out.dtype)
                bar.update()
            else:
                write.peft(new, adapter, config.names, base, config.out.dtype)
                bar.update()
            dense.notes(new, config, plans.groups(plan), errors=exact.data(found))
    for line in exact.lines(found) if found else ():
        print(line)
    print(f"{target}: {config.out.format}, {len(given.sites)} sites by {row.name}")


def factored(
    config: configs.Config, plan: plans.Plan, given: Gathered, done: Callable[[int], object]
) -> tuple[Deltas, dict[str, exact.Error]]:
    """The merged factors, cut to `out.rank`, and how far they are from the merge that they mean."""
    made: Deltas = {}
    found: dict[str, exact.Error] = {}
    for chunk in plan.chunks:
        whole = part = plans.run_chunk(plan, chunk, given.bank, config.seed)
        if config.out.rank:
            part = algebra.truncate(whole, config.out.rank).deltas
        found |= exact.errors(plan, chunk, given.bank, whole, part, config.seed)
        made |= part
        done(len(chunk.paths))
    return made, found


def by_tensors(
    config: configs.Config, base: Base | None, target: Path, dry: bool, overwrite: bool
) -> None:
    """A merge into merged weights, tensor by tensor, as mergekit has it."""
    plan = dense.make(config, base)
    if dry:
        print(dense.describe(plan, config))
        return
    with tqdm(total=len(plan.inputs.donor.files), desc=config.method, file=sys.stderr) as bar:
        with write.whole(target, overwrite) as new:
            dense.write(new, plan, config, lambda: _step(bar))
    print(f"{target}: merged, {len(plan.options)} tensors by {config.method}")


def _step(bar: tqdm) -> None:
    bar.update()

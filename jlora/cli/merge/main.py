"""`python -m jlora.merge --config merge.yaml`: read, plan, merge, write.

Source: our reading.
Deviates: nothing.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from jlora import algebra
from jlora.algebra import Deltas
from jlora.cli.merge import config as configs
from jlora.cli.merge import plan as plans
from jlora.cli.merge import read, write
from jlora.cli.merge.base import Base
from jlora.cli.merge.stopping import stoppable
from jlora.io import FormatError
from jlora.merge_cli import cache, documents
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
    own = argv is None  # a program of its own, not a call
    if own:
        cache.keep_compiled()
    target: list[Path] = []  # once it is known
    work = functools.partial(_attempt, args, target.append)
    try:
        if own:
            made = stoppable(work, lambda: [write.abandon(path) for path in target])
        else:
            made = work()
    except (configs.ConfigError, FormatError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(made)
    return 0


def _attempt(args: argparse.Namespace, aimed: Callable[[Path], object]) -> str:
    return run(args.config, args.out, args.dry_run, args.overwrite, aimed)


def run(
    path: Path, out: Path | None, dry: bool, overwrite: bool, aimed: Callable[[Path], object]
) -> str:
    """One merge.

    Args:
      path: the YAML file.
      out: where to write; None: where the file says.
      dry: only plan.
      overwrite: replace an output that is there.
      aimed: called with the target before anything is written.

    Returns:
      What to tell: the plan, or what was written.

    Raises:
      ConfigError, FormatError, ValueError: whatever is refused.
    """
    config = configs.parse(documents.read(path), path.parent)
    target = out or config.out.path
    if target is None:
        raise configs.ConfigError("out.path: lacks; give it there or as --out")
    aimed(target)
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
        for name in table:
            base.written(name, config.out.dtype, table)  # refused before anything is merged
    plan = plans.make(config, row, given)
    if dry:
        sizes = plans.memory(plan, given.bank, config.seed)
        if config.out.format == "merged" and base is not None:
            sizes["largest shard, while written"] = base.writing(table, config.out.dtype)
        return plans.describe(config, plan, given, sizes)
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
    return f"{target}: {config.out.format}, {len(given.sites)} sites by {row.name}"


def _step(bar: tqdm) -> None:
    bar.update()

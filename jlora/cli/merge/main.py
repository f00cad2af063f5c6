"""`python -m jlora.merge --config merge.yaml`: read, plan, merge, write.

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
from jlora.cli.merge import cache, dense, documents, exact, factors, read, write
from jlora.cli.merge import config as configs
from jlora.cli.merge import plan as plans
from jlora.cli.merge.base import Base
from jlora.cli.merge.stopping import stoppable
from jlora.core.adapter import Adapter
from jlora.io import FormatError
from jlora.merging.engine.inputs import Gathered, gather, to_adapter
from jlora.merging.engine.run import check_finite


def program(words: Sequence[str]) -> int:
    """Runs the command as all that its process does.

    Compiled programs are kept for the next run, and a signal ends the process at once, without
    leaving anything half-written.

    Args:
      words: those after `jlora merge`.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    return _main(words, own=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora merge`; None: those of the process, as by `program`.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    return program(sys.argv[1:]) if argv is None else _main(argv, own=False)


def _main(words: Sequence[str], own: bool) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m jlora.merge", description=configs.__doc__, formatter_class=raw
    )
    parser.add_argument("--config", type=Path, required=True, help="the YAML file")
    parser.add_argument("--out", type=Path, help="where to write, instead of out.path")
    parser.add_argument("--dry_run", action="store_true", help="print plan and peak memory only")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    args = parser.parse_args(words)
    if own:
        cache.keep_compiled()
    target: list[Path] = []  # once it is known
    work = functools.partial(_attempt, args, target.append)
    try:
        if own:
            text = stoppable(work, lambda: [write.abandon(path) for path in target])
        else:
            text = work()
    except (configs.ConfigError, FormatError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _attempt(args: argparse.Namespace, announce: Callable[[Path], object]) -> str:
    return run(args.config, args.out, args.dry_run, args.overwrite, announce)


def run(
    path: Path, out: Path | None, dry: bool, overwrite: bool, announce: Callable[[Path], object]
) -> str:
    """One merge.

    Args:
      path: the YAML file.
      out: where to write; None: where the file says.
      dry: only plan.
      overwrite: replace an output that is there.
      announce: called with the target before anything is written.

    Returns:
      What to print: the plan, or what was written.

    Raises:
      ConfigError: the configuration is wrong, or does not fit the files.
      FormatError: a file that is not understood, or may not be replaced.
      ValueError: the name map does not fit the sites, or a merge that has no result.
    """
    config = dense.settled(configs.parse(documents.read(path), path.parent))
    target = out or config.out.path
    if target is None:
        raise configs.ConfigError("out.path: lacks; give it there or as --out")
    announce(target)
    config = dataclasses.replace(config, out=dataclasses.replace(config.out, path=target))
    row = factors.row_of(config.method)
    if not dry:
        write.recover(target)
    inputs = [path, *config.paths()]
    write.check_free(target, overwrite, inputs)
    base = Base(config.base) if config.base else None
    if dense.applies(config):
        return by_tensors(config, base, target, dry, overwrite, inputs)
    if config.out.format == "merged" and base is None:
        raise configs.ConfigError("base_model: lacks; merged weights need one")
    given = gather(read.adapters(config, base), None, missing=config.missing)
    table: write.Changed = {}
    if config.out.format == "merged" and base is not None:
        table = write.changed(base, given.sites, config.names)
        for name in table:
            base.written(name, config.out.dtype, table)  # refused before anything is merged
    plan = plans.make(config, row, given)
    whole = config.out.format == "merged" and plans.uncut(config, plan)
    if dry:
        sizes = {} if whole else plans.memory(plan, given.bank, config.seed)
        if config.out.format == "merged" and base is not None:
            sizes["largest shard, while written"] = base.writing(table, config.out.dtype)
        text = [plans.describe(config, plan, given, sizes)]
        if not whole:
            text += exact.lines(factored(config, plan, given, lambda n: None)[1])
        return "\n".join(text)
    files = len(base.files) if config.out.format == "merged" and base else 1
    with tqdm(total=len(given.sites) + files, desc=row.name, file=sys.stderr) as bar:
        if whole:
            errors, delta = {}, exact.reader(plan, given.bank, config.seed)
            adapter = Adapter({}, {}, ())
            bar.update(len(given.sites))
        else:
            merged, errors = factored(config, plan, given, bar.update)
            adapter = to_adapter(merged, given.sites)
            check_finite(row.name, merged)
            delta = functools.partial(write.delta_of, adapter)
        with write.whole(target, overwrite, inputs) as new:
            if config.out.format == "merged" and base is not None:
                change = write.adding(delta, table)
                write.merged(new, change, table, base, config.out.dtype, lambda: _step(bar))
            elif config.out.format == "orbax":
                write.orbax(new, adapter, config.out.dtype)
                bar.update()
            else:
                write.peft(new, adapter, config.names, base, config.out.dtype)
                bar.update()
            dense.notes(new, config, plans.groups(plan), errors=exact.data(errors))
    done = f"{target}: {config.out.format}, {len(given.sites)} sites by {row.name}"
    return "\n".join([*(exact.lines(errors) if errors else ()), done])


def factored(
    config: configs.Config, plan: plans.Plan, given: Gathered, done: Callable[[int], object]
) -> tuple[Deltas, dict[str, exact.Error]]:
    """The merged factors, cut to `out.rank`, and how far they are from the merge that they mean.

    Args:
      config: of the merge.
      plan: of the merge.
      given: the adapters.
      done: called with the number of sites after each chunk.

    Returns:
      (path -> factors, path -> error).

    Raises:
      ConfigError: options that the method refuses.
    """
    merged: Deltas = {}
    errors: dict[str, exact.Error] = {}
    for chunk in plan.chunks:
        whole = part = plans.run_chunk(plan, chunk, given.bank, config.seed)
        if config.out.rank:
            part = algebra.truncate(whole, config.out.rank).deltas
        errors |= exact.errors(plan, chunk, given.bank, whole, part, config.seed)
        merged |= part
        done(len(chunk.paths))
    return merged, errors


def by_tensors(
    config: configs.Config,
    base: Base | None,
    target: Path,
    dry: bool,
    overwrite: bool,
    inputs: Sequence[Path],
) -> str:
    """A merge into merged weights, tensor by tensor, as mergekit has it.

    Args:
      config: of the merge.
      base: the base model; None: none is given.
      target: where to write.
      dry: only plan.
      overwrite: replace an output that is there.
      inputs: what the merge reads; it is never replaced.

    Returns:
      What to print: the plan, or what was written.

    Raises:
      ConfigError: as `dense.make`.
      FormatError: as `dense.make` and `dense.write`, or something is at the target.
    """
    plan = dense.make(config, base)
    if dry:
        return dense.describe(plan, config)
    with tqdm(total=len(plan.inputs.donor.files), desc=config.method, file=sys.stderr) as bar:
        with write.whole(target, overwrite, inputs) as new:
            dense.write(new, plan, config, lambda: _step(bar))
    return f"{target}: merged, {len(plan.options)} tensors by {config.method}"


def _step(bar: tqdm) -> None:
    bar.update()

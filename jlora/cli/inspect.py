"""`jlora inspect PATH`: what an adapter or a bank holds, as a table, JSON or a plot.

    jlora inspect adapters/math                    a PEFT or Orbax directory, a safetensors file
    jlora inspect runs/bank --plot bank.png        norms by site, spectra, similarity of a bank
    jlora inspect adapters/math --sort norm --top 10
    jlora inspect adapters/dora --base models/base   norms of methods that read the weight
    jlora inspect adapters/math --check-names params.safetensors --names gemma
                                                   whether it fits a parameter tree: what matches
                                                   nothing, with the nearest names (check_names.py)

For every site: method, shape, rank, alpha, number of trained parameters, Frobenius norm of the
delta, its largest singular value, and its stable rank (|D|_F^2 / s_1^2: how many directions carry
it). A stacked site shows the mean over its layers; a bank the mean over its adapters.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlora import io
from jlora.cli import check_names, files
from jlora.cli.inspect_plot import plot
from jlora.cli.inspect_rows import Row, bank_size, rows, similarity, table
from jlora.cli.merge import read as merge_read
from jlora.cli.merge.base import Base
from jlora.core.adapter import Adapter
from jlora.core.merge import delta
from jlora.io import FormatError
from jlora.merging.convert import factored
from jlora.types import Dynamic


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora inspect`; None: those of the process.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    parser = argparse.ArgumentParser(
        "jlora inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="an adapter or a bank in any format")
    parser.add_argument("--base", type=Path, help="Hugging Face directory of the base model")
    parser.add_argument("--prefix", help="module prefix of a kohya file that holds several")
    parser.add_argument("--component", help="component of a diffusers file that holds several")
    parser.add_argument("--sort", choices=("site", "norm", "parameters", "stable_rank"))
    parser.add_argument("--top", type=int, help="only the first rows")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--plot", type=Path, help="write a picture: .png, .pdf or .svg")
    parser.add_argument(
        "--check-names", "--check_names", type=Path, metavar="TREE",
        help="parameters that the adapter is for: a safetensors file, an Orbax checkpoint, or JSON "
        "{path: [dtype, *shape]}; exit status 1 where something of the file has no place in them",
    )  # fmt: skip
    parser.add_argument("--names", help="a built-in name map (llama, ...) or a YAML file")
    args = parser.parse_args(argv)
    try:
        if args.check_names:
            return _check_names(args)
        if args.names:
            raise ValueError("--names: got it without --check-names, expected both")
        print(run(args))
    except (FormatError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_names(args: argparse.Namespace) -> int:
    """Prints what matches nothing; 1 where the file cannot be read for the tree."""
    kind = files.detect(args.path)
    start = files.start_of(args.path, kind, args.prefix if kind == "kohya" else args.component)
    names = files.names_of(args.names)
    check = check_names.check(args.path, check_names.tree_of(args.check_names), names, start)
    print(json.dumps(dataclasses.asdict(check), indent=2) if args.json else check.text())
    return 0 if check.good else 1


def run(args: argparse.Namespace) -> str:
    """Inspects one adapter; writes the plot.

    Args:
      args: as the parser of `main` gives them.

    Returns:
      The text that is printed.
    """
    kind = files.detect(args.path)
    base = Base(args.base) if args.base else None
    names = files.names_of(None)
    start = files.start_of(args.path, kind, args.prefix if kind == "kohya" else args.component)
    adapter, extras = files.read(args.path, kind, names, base=base, start=start)
    lines = rows(adapter, _dense(adapter, base, names))
    cosines = similarity(adapter)
    if args.plot:
        plot(lines, cosines, args.plot)
    if args.sort:
        key = {"site": lambda r: r.site}.get(args.sort, lambda r: -(getattr(r, args.sort) or 0.0))
        lines.sort(key=key)
    shown = lines[: args.top] if args.top else lines
    size = bank_size(adapter)
    if args.json:
        data = {"path": str(args.path), "format": kind, "bank": size, "extras": sorted(extras)}
        data["sites"] = [dataclasses.asdict(r) for r in shown]
        if cosines is not None:
            data["cosines"] = cosines.tolist()
        return json.dumps(data, indent=2)
    return "\n".join([table(shown), "", _summary(kind, size, lines, extras, cosines)])


def _dense(adapter: Adapter, base: Base | None, names: io.NameMap) -> dict[str, Dynamic]:
    """Deltas of sites without factors, from the base's weights."""
    if base is None or bank_size(adapter) is not None:
        return {}
    weights = {
        site.path: merge_read.unfolded(base.kernel(site, names), site)
        for site, method in adapter.sites
        if not factored(adapter, site, method)
    }
    if not weights:
        return {}
    kept = tuple((s, m) for s, m in adapter.sites if s.path in weights)
    return delta(weights, adapter.replace(sites=kept))


def _summary(
    kind: str, size: int | None, lines: Sequence[Row], extras: Dynamic, cosines: np.ndarray | None
) -> str:
    what = f"bank of {size} adapters" if size else "adapter"
    methods = ", ".join(sorted({r.method for r in lines}))
    parts = [f"{kind} {what}: {len(lines)} sites, {methods}"]
    parts.append(f"{sum(r.parameters for r in lines):,} trained parameters per adapter")
    known = [r.norm for r in lines if r.norm is not None]
    if known:
        parts.append(f"norm {math.sqrt(sum(n * n for n in known)):.4g}")
    if len(known) < len(lines):
        parts.append(f"{len(lines) - len(known)} sites need --base for their norm")
    if extras:
        parts.append(f"brings weights of the base along: {', '.join(sorted(extras))}")
    if cosines is not None and len(cosines) > 1:
        off = cosines[~np.eye(len(cosines), dtype=bool)]
        parts.append(f"cosines {off.min():.3f} to {off.max():.3f}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())

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

import jax
import numpy as np

from jlora import algebra, io
from jlora.cli import check_names, files
from jlora.cli.merge import read as merge_read
from jlora.cli.merge.base import Base
from jlora.core.adapter import Adapter
from jlora.core.merge import delta
from jlora.core.method import Method, innermost
from jlora.io import FormatError
from jlora.merging.convert import factored
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Row:
    """One site."""

    site: str  # path
    method: str  # "LoRA"
    shape: tuple[int, ...]  # of the leaf
    rank: int | None  # None for methods without one
    alpha: float | None  # scale * rank; None for methods without a scale
    parameters: int  # trained, of one adapter
    norm: float | None  # of the delta, Frobenius; None when it needs the base's weights
    top: float | None  # largest singular value
    stable_rank: float | None  # norm^2 / top^2
    spectrum: tuple[float, ...]  # singular values, mean over stack and bank


def rank_of(method: Method) -> int | None:
    """The rank of a method, or of the one that it wraps.

    Args:
      method: of a site.

    Returns:
      None for methods without a rank.
    """
    return getattr(innermost(method), "rank", None)


def bank_size(adapter: Adapter) -> int | None:
    """How many adapters a bank holds.

    Args:
      adapter: an adapter or a bank.

    Returns:
      N; None for a single adapter.
    """
    for site, _ in adapter.sites:
        own = {**adapter.frozen.get(site.path, {}), **adapter.trainable.get(site.path, {})}
        if "scale" in own:  # one number per stack slice
            return own["scale"].shape[0] if own["scale"].ndim > len(site.stack) else None
        if "a" in own and "b" in own:  # two axes per stack slice
            return own["a"].shape[0] if own["a"].ndim > len(site.stack) + 2 else None
    return None


def rows(adapter: Adapter, dense: dict[str, Dynamic] | None = None) -> list[Row]:
    """One row per site.

    Args:
      adapter: an adapter or a bank.
      dense: path -> delta [*stack, d_in, d_out] of sites whose delta has no factors, where known.

    Returns:
      One row per site, in their order.
    """
    size, out = bank_size(adapter), []
    for site, method in adapter.sites:
        one = Adapter(
            {k: adapter.trainable[k] for k in (site.path, site.group) if k in adapter.trainable},
            {k: adapter.frozen[k] for k in (site.path, site.group) if k in adapter.frozen},
            ((site, method),),
        )
        own = {**one.frozen.get(site.path, {}), **one.trainable.get(site.path, {})}
        rank = rank_of(method)
        scale = np.asarray(own["scale"], np.float64) if "scale" in own else None
        alpha = float(scale.mean() * rank) if scale is not None and rank else None
        s = _spectrum(one, size is not None, (dense or {}).get(site.path))
        count = sum(t.size for t in one.trainable.get(site.path, {}).values()) // (size or 1)
        norm, top = (
            (None, None) if s is None else (_mean(np.sqrt((s**2).sum(-1))), _mean(s[..., 0]))
        )
        stable = None if s is None or not top else _mean((s**2).sum(-1) / np.square(s[..., 0]))
        out.append(
            Row(
                site=site.path,
                method=type(method).__name__,
                shape=site.shape,
                rank=rank,
                alpha=alpha,
                parameters=count,
                norm=norm,
                top=top,
                stable_rank=stable,
                spectrum=() if s is None else tuple(s.reshape(-1, s.shape[-1]).mean(0).tolist()),
            )
        )
    return out


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x))


def _spectrum(one: Adapter, bank: bool, dense: Dynamic) -> np.ndarray | None:
    """Singular values [..., k] of the only site of `one`; None without factors or a dense delta."""
    if dense is not None:
        return np.linalg.svd(np.asarray(dense, np.float64), compute_uv=False)
    try:
        read = jax.vmap(algebra.deltas) if bank else algebra.deltas
        found = algebra.singular_values(read(one))
    except TypeError:
        return None
    return np.asarray(next(iter(found.values())), np.float64)


def similarity(adapter: Adapter) -> np.ndarray | None:
    """The cosines of a bank.

    Args:
      adapter: an adapter or a bank.

    Returns:
      [N, N]; None for one adapter, or without factors.
    """
    if bank_size(adapter) is None:
        return None
    try:
        return np.asarray(algebra.similarity(adapter))
    except TypeError:
        return None


def table(found: Sequence[Row]) -> str:
    """The rows as aligned text.

    Args:
      found: one row per site.

    Returns:
      The text.
    """
    head = ("site", "method", "shape", "rank", "alpha", "parameters", "norm", "s1", "stable rank")
    lines = [
        (
            r.site,
            r.method,
            "x".join(map(str, r.shape)),
            _text(r.rank),
            _text(r.alpha),
            f"{r.parameters:,}",
            _text(r.norm),
            _text(r.top),
            _text(r.stable_rank),
        )
        for r in found
    ]
    width = [max(len(line[k]) for line in (head, *lines)) for k in range(len(head))]
    left = 3  # text columns
    aligned = []
    for line in (head, *lines):
        cells = list(zip(line, width, strict=True))
        aligned.append(
            "  ".join([c.ljust(w) for c, w in cells[:left]] + [c.rjust(w) for c, w in cells[left:]])
        )
    return "\n".join(line.rstrip() for line in aligned)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def plot(found: Sequence[Row], cosines: np.ndarray | None, path: Path) -> None:
    """Writes norms by site, spectra, and the similarity of a bank as one picture.

    Args:
      found: one row per site.
      cosines: [N, N] of a bank; None: no such panel.
      path: of the picture; the suffix is its format.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'jlora[experiments]'") from error
    known = [r for r in found if r.norm is not None]
    if not known:
        raise ValueError("no site has a norm without the base's weights; give --base")
    panels = 2 + (cosines is not None)
    height = max(3.0, 0.22 * len(known) + 1.2)
    figure = Figure(figsize=(5.5 * panels, min(height, 24)), layout="constrained")
    axes = figure.subplots(1, panels)
    axes[0].barh([r.site for r in known], [r.norm or 0.0 for r in known], color="#4878a8")
    axes[0].invert_yaxis()
    axes[0].set_xlabel("Frobenius norm of the delta")
    axes[0].tick_params(axis="y", labelsize=7)
    for r in known:
        axes[1].plot(range(1, len(r.spectrum) + 1), r.spectrum, color="#4878a8", alpha=0.35)
    axes[1].set_xlabel("index")
    axes[1].set_ylabel("singular value, one line per site")
    axes[1].set_ylim(bottom=0)
    if cosines is not None:
        image = axes[2].imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        axes[2].set_xlabel("adapter of the bank")
        axes[2].set_title("cosine of the deltas")
        figure.colorbar(image, ax=axes[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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
    found = check_names.check(args.path, check_names.tree_of(args.check_names), names, start)
    print(json.dumps(dataclasses.asdict(found), indent=2) if args.json else found.text())
    return 0 if found.good else 1


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
    found = rows(adapter, _dense(adapter, base, names))
    cosines = similarity(adapter)
    if args.plot:
        plot(found, cosines, args.plot)
    if args.sort:
        key = {"site": lambda r: r.site}.get(args.sort, lambda r: -(getattr(r, args.sort) or 0.0))
        found.sort(key=key)
    shown = found[: args.top] if args.top else found
    size = bank_size(adapter)
    if args.json:
        data = {"path": str(args.path), "format": kind, "bank": size, "extras": sorted(extras)}
        data["sites"] = [dataclasses.asdict(r) for r in shown]
        if cosines is not None:
            data["cosines"] = cosines.tolist()
        return json.dumps(data, indent=2)
    return "\n".join([table(shown), "", _summary(kind, size, found, extras, cosines)])


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
    kind: str, size: int | None, found: Sequence[Row], extras: Dynamic, cosines: np.ndarray | None
) -> str:
    what = f"bank of {size} adapters" if size else "adapter"
    methods = ", ".join(sorted({r.method for r in found}))
    parts = [f"{kind} {what}: {len(found)} sites, {methods}"]
    parts.append(f"{sum(r.parameters for r in found):,} trained parameters per adapter")
    known = [r.norm for r in found if r.norm is not None]
    if known:
        parts.append(f"norm {math.sqrt(sum(n * n for n in known)):.4g}")
    if len(known) < len(found):
        parts.append(f"{len(found) - len(known)} sites need --base for their norm")
    if extras:
        parts.append(f"brings weights of the base along: {', '.join(sorted(extras))}")
    if cosines is not None and len(cosines) > 1:
        off = cosines[~np.eye(len(cosines), dtype=bool)]
        parts.append(f"cosines {off.min():.3f} to {off.max():.3f}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())

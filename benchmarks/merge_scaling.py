r"""What a merge costs as the number of adapters T and their rank r grow.

``python -m benchmarks.merge_scaling``: milliseconds on one site of 1024 x 1024 to factors of rank
16, of `truncated` (the core SVD), `ties` and `dare_ties` (streamed) and of the dense SVD of the
sum, over T at r = 16 and over r at T = 8. ``exponent`` is the slope :math:`p` of
:math:`t \propto T^p` (or :math:`r^p`) between the last two points. The plot is
``docs/results/merge_scaling.svg`` (not with ``--quick``).
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import merging, timing
from benchmarks.merge_core_svd import dense_svd
from jlora.merging.elementwise.dare import dare_ties
from jlora.merging.elementwise.ties import ties
from jlora.merging.exact.truncated import truncated

PLOT = Path(__file__).parents[1] / "docs" / "results" / "merge_scaling.svg"
OUT = 16  # rank of the result


def measure(settings: timing.Settings) -> dict[str, Any]:
    size = 48 if settings.quick else 1024
    adapters = [2, 4] if settings.quick else [2, 4, 8, 16, 32]
    ranks = [2, 4] if settings.quick else [4, 8, 16, 32, 64]
    figures: dict[str, Any] = {
        "size": size,
        "adapters": _curve([(t, ranks[1] if settings.quick else 16) for t in adapters], size, 0,
                           settings),
        "rank": _curve([(adapters[1] if settings.quick else 8, r) for r in ranks], size, 1,
                       settings),
    }  # fmt: skip
    if not settings.quick and settings.threads == 1:
        _plot(figures, size)
    return figures


def _curve(points: Any, size: int, axis: int, settings: timing.Settings) -> dict[str, Any]:
    """{method: {T or r: ms}} and the last slopes."""
    out: dict[str, Any] = {}
    rank = min(OUT, size)
    for t, r in points:
        bank, w = merging.bank(t, 1, size, r), jnp.full(t, 1.0 / t)
        keys = jax.random.split(jax.random.key(0), t)
        methods = {
            "core SVD": lambda b, w: truncated(b, w, rank=rank),
            "TIES": lambda b, w: ties(b, w, rank=rank, density=0.2),
            "DARE-TIES": lambda b, w, k=keys: dare_ties(b, w, keys=k, rank=rank, density=0.2),
            "dense SVD": lambda b, w: dense_svd(b, w, rank),
        }
        runs = {k: merging.each(jax.jit(f), bank, w) for k, f in methods.items()}
        label = f"T={t} r={r}"
        best = timing.best(timing.interleave(runs, settings.count(2), settings, label, warm=1))
        for name, ms in best.items():
            out.setdefault(name, {})[(t, r)[axis]] = round(ms, 3)
    return {"ms": out, "exponent": {k: _slope(v) for k, v in out.items()}}


def _slope(curve: dict[int, float]) -> float:
    (x0, y0), (x1, y1) = list(curve.items())[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def _plot(figures: dict[str, Any], size: int) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jlora"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    labels = {"adapters": "adapters T (r = 16)", "rank": "rank r (T = 8)"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, curve in figures[key]["ms"].items():
            axis.loglog(list(curve), list(curve.values()), marker="o", label=name)
        axis.set_xlabel(label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms, one core")
    axes[0].legend()
    figure.suptitle(f"Merging on one site of {size} x {size}, to rank {OUT}")
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    timing.main("merge_scaling", measure, threads=(1,))

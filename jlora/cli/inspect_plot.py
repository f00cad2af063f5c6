"""The picture of `jlora inspect --plot`: norms per site, spectra, the similarity of a bank.

Deviates: nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlora.cli.inspect_rows import Row


def plot(lines: Sequence[Row], cosines: np.ndarray | None, path: Path) -> None:
    """Writes norms per site, spectra, and the similarity of a bank as one picture.

    Args:
      lines: one row per site.
      cosines: [N, N] of a bank; None: no such panel.
      path: of the picture; the suffix is its format.

    Raises:
      ValueError: matplotlib is not installed, or no site has a norm.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'jlora[experiments]'") from error
    known = [r for r in lines if r.norm is not None]
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

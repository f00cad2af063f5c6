"""Progress bars with an estimate of the time left, and TensorBoard curves."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar on stderr and scalars in `<workdir>/tensorboard/<stage>`; a context manager.

    Args:
      workdir: of the run. stage: the bar's name. total: its length, in `unit`s.
      process: only process 0 shows its bar; the curves of others go to `<stage>_<process>`.
    """

    def __init__(
        self,
        workdir: Path,
        stage: str,
        total: int,
        unit: str,
        process: int = 0,
    ):
        self.bar = tqdm(
            total=total,
            desc=f"{stage:>10}",
            unit=unit,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=1.0,
            disable=process > 0,
        )
        folder = stage.replace(" ", "_") + (f"_{process}" if process else "")
        # it imports torch where there is one: not for what ends before the first bar
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(workdir / "tensorboard" / folder))

    def step(self, count: int, **shown: float) -> None:
        """Advance by `count` and show figures alongside the bar."""
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self.bar.update(count)

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """Append one point to each TensorBoard curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, float(value), step)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.bar.close()
        self.writer.close()

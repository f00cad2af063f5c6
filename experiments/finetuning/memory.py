"""What a step will take, before any weight is read: XLA's own account of the compiled program."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np


class Needs(NamedTuple):
    """Bytes per device, and numbers of parameters."""

    base: int  # parameters that stay as they are
    trained: int  # parameters of the adapter
    weights: int  # bytes of the base
    state: int  # bytes of adapter and optimizer
    temporary: int  # bytes that XLA takes during a step
    total: int  # bytes of arguments, results and temporaries, what is donated counted once

    def lines(self, steps: int, rows: int, tokens: int) -> list[str]:
        """The same as text, for a run of `steps` on `rows` rows with `tokens` learned tokens."""
        mib = lambda n: f"{n / 2**20:,.1f} MiB"  # noqa: E731
        return [
            f"parameters: {self.base:,} frozen, {self.trained:,} trained"
            f" ({100 * self.trained / self.base:.3f} %)",
            f"data: {rows:,} rows, {tokens:,} learned tokens; {steps:,} steps",
            f"memory per device: {mib(self.total)} (weights {mib(self.weights)}, adapter and"
            f" optimizer {mib(self.state)}, a step's temporaries {mib(self.temporary)})",
        ]


def needs(compiled: Any, dense: Any, params: Any, state: Any) -> Needs:
    """Reads the analysis of a compiled step.

    Args:
      compiled: the step, compiled.
      dense: shapes of the base's parameters as the file has them.
      params: shapes of the prepared ones, with shardings.
      state: shapes of the state, with shardings.
    """
    analysis = compiled.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return Needs(
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dense)),
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trainable)),
        _bytes(params), _bytes(state), analysis.temp_size_in_bytes, total,
    )  # fmt: skip


def _bytes(tree: Any) -> int:
    def one(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = place.shard_shape(leaf.shape) if place is not None else leaf.shape
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))

r"""The 512 x 512 matrix of cosines of a bank of adapters: factored against dense.

``python -m benchmarks.bank_similarity``. 512 adapters of rank 8 on 4 sites of 768 x 768,
one core, CPU time:

- ``jlora``: `algebra.similarity`, inner products by the factors alone;
- ``dense``: torch, a site at a time: all deltas [512, d * d], then their Gram matrix.

``ratio_vs_dense`` is peer time / jlora time, ``memory_vs_dense`` the same of the peak memory of a
call; ``difference`` is the largest between the two matrices of cosines.
"""

from typing import Any

import jax
import numpy as np
import torch

from benchmarks import merging, timing
from jlora import algebra


def dense(bank: Any) -> np.ndarray:
    """Cosines by way of dense deltas; bank {site: (u [N, d, r], v [N, r, d])} of torch."""
    total: Any = 0.0
    for u, v in bank.values():
        delta = torch.bmm(u, v).reshape(u.shape[0], -1)
        total = total + delta @ delta.T
    size = torch.sqrt(torch.diagonal(total))
    return (total / size[:, None] / size[None]).numpy()


def measure(settings: timing.Settings) -> dict[str, Any]:
    n, sites, size, rank = (16, 2, 32, 2) if settings.quick else (512, 4, 768, 8)
    bank = merging.bank(n, sites, size, rank)
    torch.set_num_threads(settings.threads)
    other = {k: tuple(torch.tensor(np.asarray(t)) for t in low) for k, low in bank.items()}
    similarity = jax.jit(algebra.similarity)
    runs = {
        "jlora": lambda: similarity(bank).block_until_ready(),
        "dense": lambda: dense(other),
    }
    difference = float(np.abs(np.asarray(similarity(bank)) - dense(other)).max())
    seconds = timing.interleave(runs, settings.count(2), settings, f"similarity {n}", warm=1)
    memory = {k: timing.transient_mib(run) for k, run in runs.items()}
    share = None if memory["jlora"] is None else memory["dense"] / max(memory["jlora"], 1.0)
    return merging.ratios(timing.best(seconds)) | {
        "memory_vs_dense": share,
        "shape": {"adapters": n, "sites": sites, "size": size, "rank": rank},
        "difference": difference,
        "ms": timing.spread(seconds),
        "transient_mib": memory,
    }


if __name__ == "__main__":
    timing.main("bank_similarity", measure, threads=(1,))

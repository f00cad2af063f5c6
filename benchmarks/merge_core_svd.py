r"""The weighted sum of 8 adapters of rank 16 on 2048 x 2048, cut to rank 16: core against dense.

``python -m benchmarks.merge_core_svd``. Peers, on one core, CPU time:

- ``jlora``: `truncated`, the SVD of the :math:`\Sigma r \times \Sigma r` core;
- ``peft``: ``add_weighted_adapter(combination_type="svd")``, as it comes (full singular vectors);
- ``peft_thin``: the same with ``svd_full_matrices=False``;
- ``dense``: hand-written JAX, the SVD of the dense sum.

``ratio_vs_*`` is peer time / jlora time. ``error_vs_dense`` are the distances of the results to
that of ``dense``, relative; ``transient_mib`` the peak memory of a call.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import merging, timing
from jlora.algebra import LowRank
from jlora.merging.exact.truncated import truncated


def dense_svd(low: LowRank, w: jax.Array, rank: int) -> LowRank:
    """The same by way of the dense delta."""
    delta = jnp.einsum("n,nir,nro->io", w, low.u, low.v, precision="highest")
    u, s, v = jnp.linalg.svd(delta, full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], v[:rank])


def measure(settings: timing.Settings) -> dict[str, Any]:
    n, size, rank = (3, 64, 4) if settings.quick else (8, 2048, 16)
    bank = merging.bank(n, 1, size, rank)
    (path, low), w = next(iter(bank.items())), jnp.full(n, 1.0 / n)
    ours = jax.jit(lambda low, w: truncated(low, w, rank=rank))
    plain = jax.jit(lambda low, w: dense_svd(low, w, rank))
    theirs = merging.Peft(bank, settings.threads)

    def peft(full: bool) -> None:
        theirs.merge(w, "svd", svd_rank=rank, svd_full_matrices=full)

    fast = {"jlora": merging.each(ours, bank, w)}
    slow = {
        "dense": merging.each(plain, bank, w),
        "peft_thin": lambda: peft(False),
        "peft": lambda: peft(True),
    }
    timing.interleave(fast, settings.count(20), settings, "core svd")  # compiled, warm
    ms, memory = merging.few(slow, settings, f"svd {size}")
    again = timing.interleave(fast, settings.count(20), settings, "core svd")
    ms |= timing.best(again)
    exact, got = plain(low, w), ours(low, w)
    exact = exact.u @ exact.v
    return merging.ratios(ms) | {
        "shape": {"adapters": n, "rank": rank, "size": size},
        "ms": ms,
        "error_vs_dense": {
            "jlora": merging.gap(got.u @ got.v, exact),
            "peft": merging.gap(theirs.product(path), exact),
        },
        "transient_mib": memory | {"jlora": timing.transient_mib(fast["jlora"])},
    }


if __name__ == "__main__":
    timing.main("merge_core_svd", measure, threads=(1,))

r"""The weighted sum of 8 adapters of rank 16 on 2048 x 2048, cut to rank 16: core against dense.

``python -m benchmarks.merge_core_svd``. Peers, on one core, CPU time:

- ``jlora``: `truncated`, the SVD of the :math:`\Sigma r \times \Sigma r` core;
- ``peft``: ``add_weighted_adapter(combination_type="svd")``, as it comes (full singular vectors);
- ``peft_thin``: the same with ``svd_full_matrices=False``;
- ``dense``: hand-written JAX, the SVD of the dense sum.

``ratio_vs_*`` is peer time / jlora time. ``error_vs_dense`` are the distances of the results to
that of ``dense``, relative; ``transient_mib`` the peak memory of a call.

Source: our reading. Deviates: -.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import merging, timing
from jlora.core.algebra import LowRank
from jlora.merging.truncated import truncated


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

    def peft(thin: bool, keep: bool = False) -> None:
        theirs.merge(w, "svd", keep, svd_rank=rank, svd_full_matrices=not thin)

    runs = {
        "jlora": merging.each(ours, bank, w),
        "dense": merging.each(plain, bank, w),
        "peft_thin": lambda: peft(True),
        "peft": lambda: peft(False),
    }
    reference = plain(low, w)
    exact = reference.u @ reference.v
    got = ours(low, w)
    peft(False, keep=True)
    errors = {"jlora": merging.gap(got.u @ got.v, exact),
              "peft": merging.gap(theirs.product(path), exact)}  # fmt: skip
    seconds = timing.interleave(runs, settings.count(2), settings, f"merge {size}", warm=1)
    return merging.ratios(timing.best(seconds)) | {
        "shape": {"adapters": n, "rank": rank, "size": size},
        "ms": timing.spread(seconds),
        "error_vs_dense": errors,
        "transient_mib": {k: timing.transient_mib(runs[k]) for k in ("jlora", "peft")},
        "weights": np.asarray(w).tolist(),
    }


if __name__ == "__main__":
    timing.main("merge_core_svd", measure, threads=(1,))

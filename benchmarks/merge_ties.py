r"""TIES and DARE-TIES over 8 adapters of 64 sites: by row blocks against dense deltas.

``python -m benchmarks.merge_ties``. On one core, CPU time, density 0.2. From factors to factors
of the same rank:

- ``jlora``: `ties`, `dare_ties` by default, one site after the other: the merged matrix of a site
  of 384 x 384 is stored, that of ``large`` is not;
- ``jlora_streamed``: with ``Solver(store=False)``, in several passes over row blocks;
- ``peft``: ``add_weighted_adapter`` with ``ties_svd``, ``dare_ties_svd`` (dense deltas, full SVD).

To full weights (base + merged delta):

- ``jlora_dense``: the same rules by `streamed.into`, from factors, to new weights;
- ``jlora_in_place``: the same on bases that are given up, whose place the results take;
- ``mergekit``: ``merge_tensors`` of mergekit, where it is installed, from dense fine-tuned weights
  that are made beforehand (that is all it reads; making them is not timed). Null elsewhere.

In factor space (gauge-dependent, another result): ``jlora_factor``, ``peft_factor``, the
combination types ``ties`` and ``dare_ties`` of PEFT.

``memory_at_best`` is mergekit's peak / the bytes of the results, which both sides return: what no
merge into new weights can pass.

``ratio_*`` is peer time / jlora time, ``memory_*`` peer / jlora of ``transient_mib``, the peak
memory of a call (jlora's counts as ``xla_temp_mib`` at least); ``large`` is one site of
2048 x 2048. ``agreement`` compares results of TIES.

Reference: the public interfaces. Deviates: nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import merging, timing
from jlora.algebra import LowRank
from jlora.merging.elementwise.dare import dare_ties, dare_ties_rule
from jlora.merging.elementwise.ties import ties, ties_rule
from jlora.merging.engine.streamed import Solver, into
from jlora.merging.peft.factors import peft_dare_ties, peft_ties

DENSITY = 0.2
SITES, RULES = (
    {"ties": ties, "dare_ties": dare_ties},
    {"ties": ties_rule, "dare_ties": dare_ties_rule},
)


def measure(settings: timing.Settings) -> dict[str, Any]:
    n, sites, size, rank = (3, 2, 48, 4) if settings.quick else (8, 64, 384, 16)
    family = _family(n, sites, size, rank, settings)
    if not settings.quick:
        family["large"] = _large(8, 2048, 16, settings)
    return family


def ours(kind: str, n: int, rank: int, store: bool | None = None) -> tuple[Callable, Callable]:
    """(to factors, to the dense weight) of one site, jitted: (low, w [, base])."""
    extra = {"keys": jax.random.split(jax.random.key(0), n)} if kind == "dare_ties" else {}
    run = functools.partial(SITES[kind], rank=rank, density=DENSITY, solver=Solver(store=store))
    rule = functools.partial(RULES[kind], density=DENSITY)

    def full(low: LowRank, w: jax.Array, base: jax.Array) -> jax.Array:
        return into(low, rule(low, w, **extra), base)

    return jax.jit(lambda low, w: run(low, w, **extra)), jax.jit(full)


def _family(n: int, sites: int, size: int, rank: int, settings: timing.Settings) -> dict[str, Any]:
    bank, w = merging.bank(n, sites, size, rank), jnp.full(n, 1.0 / n)
    theirs, base = merging.Peft(bank, settings.threads), jnp.zeros((size, size))
    figures: dict[str, Any] = {"shape": {"adapters": n, "sites": sites, "size": size, "rank": rank}}
    merge_tensors = mergekit()
    figures["mergekit"] = "0.1.5" if merge_tensors else None
    for kind in SITES:
        low_rank, full = ours(kind, n, rank)
        streamed, _ = ours(kind, n, rank, store=False)
        factor = {"ties": peft_ties, "dare_ties": peft_dare_ties}[kind]
        keys = {"keys": jax.random.split(jax.random.key(0), n)} if kind == "dare_ties" else {}
        in_factors = jax.jit(lambda low, w, f=factor, k=keys: f(low, w, density=DENSITY, **k))
        fast = {
            "jlora": merging.each(low_rank, bank, w),
            "jlora_streamed": merging.each(streamed, bank, w),
            "jlora_dense": merging.each(full, bank, w, base),
            "jlora_in_place": _in_place(kind, bank, w, base),
            "jlora_factor": merging.each(in_factors, bank, w),
            "peft_factor": lambda kind=kind: theirs.merge(w, kind, density=DENSITY),
        }
        slow = {
            "peft": lambda kind=kind: theirs.merge(w, f"{kind}_svd", density=DENSITY, svd_rank=rank)
        }
        if merge_tensors:
            slow["mergekit"] = kit(merge_tensors, kind, bank, np.asarray(w))
        seconds = timing.interleave(fast, settings.count(3), settings, kind, warm=1)
        ms, memory = merging.few(slow, settings, kind)
        ms |= timing.best(seconds)
        memory |= {k: timing.transient_mib(run) for k, run in fast.items()}
        first = next(iter(bank.values()))
        temp, temp_full = (
            merging.temp_mib(*run) for run in ((low_rank, first, w), (full, first, w, base))
        )
        figures[kind] = {
            **_against(ms, memory, "peft", "jlora", temp),
            **_against(ms, memory, "mergekit", "jlora_dense"),
            "memory_at_best": _at_best(memory, sites * size * size * 4),
            "in_place": _against(ms, memory, "mergekit", "jlora_in_place", temp_full),
            **_against(ms, memory, "peft_factor", "jlora_factor"),
            "ms": ms,
            "transient_mib": memory,
            "xla_temp_mib": temp,
        }
    figures["agreement"] = _agreement(bank, w, rank, theirs, merge_tensors)
    for key in ("ratio_vs_peft", "memory_vs_peft", "ratio_vs_mergekit", "memory_vs_mergekit"):
        values = [figures[kind][key] for kind in SITES if figures[kind].get(key) is not None]
        figures[key] = min(values) if values else None
    return figures


def _in_place(kind: str, bank: merging.Bank, w: Any, base: jax.Array) -> timing.Fresh:
    """The merge to full weights on a base of each site's own, which is donated."""
    n, _, rank = next(iter(bank.values())).u.shape
    full = jax.jit(ours(kind, n, rank)[1], donate_argnums=2)

    def run(bases: dict[str, jax.Array]) -> Any:
        for path in bases:
            bases[path] = full(bank[path], w, bases[path])
        return jax.block_until_ready(bases)

    return timing.Fresh(lambda: jax.block_until_ready({k: base.copy() for k in bank}), run)


def _large(n: int, size: int, rank: int, settings: timing.Settings) -> dict[str, Any]:
    """Two calls each (PEFT's full SVD takes long): the faster one's time, one's memory."""
    bank, w = merging.bank(n, 1, size, rank), jnp.full(n, 1.0 / n)
    theirs, (low_rank, full) = merging.Peft(bank, settings.threads), ours("ties", n, rank)
    runs = {
        "jlora": merging.each(low_rank, bank, w),
        "jlora_dense": merging.each(full, bank, w, jnp.zeros((size, size))),
        "peft": lambda: theirs.merge(w, "ties_svd", density=DENSITY, svd_rank=rank),
    }
    merge_tensors = mergekit()
    if merge_tensors:
        runs["mergekit"] = kit(merge_tensors, "ties", bank, np.asarray(w))
    ms, memory = merging.few(runs, settings, f"ties {size}")
    temp = merging.temp_mib(low_rank, bank["layer0"], w)
    return {
        "shape": {"adapters": n, "size": size, "rank": rank},
        **_against(ms, memory, "peft", "jlora", temp),
        **_against(ms, memory, "mergekit", "jlora_dense"),
        "ms": ms,
        "transient_mib": memory,
        "xla_temp_mib": temp,
    }


def _against(ms: Any, memory: Any, peer: str, us: str, least: float = 1.0) -> dict[str, Any]:
    """Ratios of time and of memory, where ours counts as `least` MiB at least."""
    if peer not in ms:
        return {f"ratio_vs_{peer}": None, f"memory_vs_{peer}": None}
    # pages that the process already has are not seen by the kernel's accounting
    share = memory[peer] / max(memory[us], least, 1.0) if memory[us] is not None else None
    return {f"ratio_vs_{peer}": ms[peer] / ms[us], f"memory_vs_{peer}": share}


def _at_best(memory: Any, results: int) -> float | None:
    return memory["mergekit"] * 2**20 / results if memory.get("mergekit") else None


def mergekit() -> Any:
    """`merge_tensors`, or None where mergekit is not installed."""
    try:
        from mergekit.merge_methods.api import merge_tensors
    except ImportError:
        return None
    return merge_tensors


def kit(merge_tensors: Any, kind: str, bank: merging.Bank, w: np.ndarray) -> Callable[[], Any]:
    """mergekit on fine-tuned weights (base zero), made here."""
    size = next(iter(bank.values())).u.shape[1]
    base = torch.zeros(size, size)
    tuned = {
        path: [torch.tensor(np.asarray(u) @ np.asarray(v)) for u, v in zip(*low, strict=True)]
        for path, low in bank.items()
    }
    options = {"density": DENSITY, "weight": list(map(float, w)), "normalize": True}
    options["rescale"] = kind == "dare_ties"

    def run() -> Any:
        return {
            path: merge_tensors([base, *many], kind, parameters=options, base_index=0)
            for path, many in tuned.items()
        }

    return run


def _agreement(bank: merging.Bank, w: Any, rank: int, theirs: Any, merge_tensors: Any) -> Any:
    """Relative distances of results of TIES: ours to mergekit's, dense; to PEFT's, as factors."""
    path, low = next(iter(bank.items()))
    one = {path: low}
    agreement = {}
    if merge_tensors:
        _, full = ours("ties", low.u.shape[0], rank)
        kits = kit(merge_tensors, "ties", one, np.asarray(w))()[path]
        agreement["mergekit"] = merging.gap(full(low, w, jnp.zeros(kits.shape)), kits)
    theirs.merge(w, "ties_svd", density=DENSITY, svd_rank=rank)
    from jlora.merging.peft.svd import peft_ties_svd

    got = jax.jit(lambda low, w: peft_ties_svd(low, w, density=DENSITY, rank=rank))(low, w)
    agreement["peft"] = merging.gap(got.u @ got.v, theirs.product(path))
    return agreement


if __name__ == "__main__":
    timing.main("merge_ties", measure, threads=(1,))

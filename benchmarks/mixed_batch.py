r"""Serving a batch whose rows use different adapters, against the base model alone.

``python -m benchmarks.mixed_batch``: forward of 32 rows of 16 and of 64 tokens, the rows spread
over 1, 8 or 32 adapters of one bank. jlora runs ``jax.vmap`` over rows and adapter ids, on the
bank in serving order (``jl.serving_bank``), PEFT its ``adapter_names``. Per case and, as the worst
of the cases, at the top:

- ``overhead_vs_base``: time / time of the base model alone, in the same stack;
- ``peft_overhead_vs_base``: the same of PEFT over torch (at the top: of the worst case for us);
- ``overhead_ratio_vs_peft``: (PEFT's overhead - 1) / (jlora's overhead - 1);
- ``overhead_ratio_together``: the overheads of all cases added up, PEFT's / jlora's;
- ``overhead_at_best``: the same as ``overhead_vs_base`` with ONE adapter for all rows, its products
  over the whole batch and no lookup: what no mixed batch can pass but by noise;
- ``overhead_ratio_at_best``: PEFT's overhead over that;
- ``recompiles``: compilations while ids, adapters and the whole bank are exchanged.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jlora as jl
from benchmarks import encoder, peers, timing


def measure(settings: timing.Settings) -> dict[str, Any]:
    base = encoder.base(settings.quick)
    rows, sizes, counts = (4, [4], [1, 4]) if settings.quick else (32, [16, 64], [1, 8, 32])
    config, params, _ = base
    adapters = [encoder.adapter(config, params, seed=k) for k in range(max(counts))]
    plain = jax.jit(encoder.apply(config))
    tuned = encoder.lifted(config)
    one = jax.jit(lambda params, ids, mask: tuned(params, adapters[0], ids, mask))

    @jax.jit
    def mixed(params, bank, which, ids, mask):
        def row(k, ids, mask):
            return tuned(params, bank[k], ids[None], mask[None])[0]

        return jax.vmap(row)(which, ids, mask)

    bank = jl.serving_bank(jl.stack(adapters))
    torch_base = peers.model(base, settings.threads)
    model = peers.peft(base, adapters, settings.threads, train=False)
    figures: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for tokens in sizes:
        batch = encoder.batch(config, rows, tokens)
        ids, mask, _ = peers.batch(batch)
        runs = {
            "base": lambda b=batch: jax.block_until_ready(plain(params, b.ids, b.mask)),
            "one_adapter": lambda b=batch: jax.block_until_ready(one(params, b.ids, b.mask)),
            "torch_base": torch.inference_mode()(
                lambda ids=ids, mask=mask: torch_base(ids, attention_mask=mask).last_hidden_state
            ),
        }
        for count in counts:
            which = np.arange(rows, dtype=np.int32) % count
            names = [f"a{k}" for k in which]
            args = (jnp.asarray(which), batch.ids, batch.mask)

            def ours(args=args):
                return jax.block_until_ready(mixed(params, bank, *args))

            @torch.inference_mode()
            def theirs(ids=ids, mask=mask, names=names):
                return model(ids, attention_mask=mask, adapter_names=names).last_hidden_state

            peers.alike(ours(), theirs(), batch.mask)
            runs |= {f"jlora_{count}": ours, f"peft_{count}": theirs}
        label = f"mixed_batch {rows}x{tokens}"
        seconds = timing.interleave(runs, settings.count(120), settings, label, limit=120)
        ms = timing.best(seconds)
        figures |= {f"{rows}x{tokens}_{count}": _case(ms, count) for count in counts}
        spread[f"{rows}x{tokens}"] = timing.spread(seconds)
    worst = max(figures.values(), key=lambda f: f["overhead_vs_base"])
    return {
        "overhead_vs_base": worst["overhead_vs_base"],
        "peft_overhead_vs_base": worst["peft_overhead_vs_base"],
        "overhead_ratio_vs_peft": min(f["overhead_ratio_vs_peft"] for f in figures.values()),
        "overhead_ratio_together": together(figures.values()),
        "overhead_ratio_at_best": min(f["overhead_ratio_at_best"] for f in figures.values()),
        "ratio_vs_peft": min(f["ratio_vs_peft"] for f in figures.values()),
        "recompiles": _recompiles(mixed, params, bank, rows, batch),
        "ms": spread,
    } | figures


def together(cases: Iterable[dict[str, Any]]) -> float:
    """PEFT's overheads of all cases / jlora's: what noise of one case's minima moves least."""
    both = [(f["peft_overhead_vs_base"] - 1, f["overhead_vs_base"] - 1) for f in cases]
    theirs, ours = (sum(t) for t in zip(*both, strict=True))
    return timing.ratio_of_extras(theirs, ours, len(both))


def _case(ms: dict[str, float], count: int) -> dict[str, Any]:
    mine, peft = ms[f"jlora_{count}"], ms[f"peft_{count}"]
    ours, theirs = mine / ms["base"], peft / ms["torch_base"]
    best = ms["one_adapter"] / ms["base"]
    return {
        "overhead_vs_base": ours,
        "peft_overhead_vs_base": theirs,
        "overhead_ratio_vs_peft": timing.ratio_of_extras(theirs - 1, ours - 1, 1.0),
        "overhead_at_best": best,
        "overhead_ratio_at_best": timing.ratio_of_extras(theirs - 1, best - 1, 1.0),
        "ratio_vs_peft": peft / mine,
    }


def _recompiles(mixed: Any, params: Any, bank: Any, rows: int, batch: encoder.Batch) -> int:
    """Compilations that other ids and another bank of the same shape cause."""
    before = mixed._cache_size()
    other = jax.tree.map(lambda t: t if t.dtype == jnp.int32 else t * 0.5, bank)
    for which in (np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)[::-1] % 2):
        jax.block_until_ready(mixed(params, other, jnp.asarray(which), batch.ids, batch.mask))
    return mixed._cache_size() - before


if __name__ == "__main__":
    timing.main("mixed_batch", measure, keep=True)

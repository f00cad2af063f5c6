r"""Time to trace and compile: a lifted function against the same function without ``jl.lift``.

``python -m benchmarks.trace_time``: the MiniLM-L6 encoder as one scan over its layers and with the
layers unrolled. Per case, for ``trace`` (to StableHLO), ``compile`` and both (``total``):

- ``forward_*``: lifted forward / plain forward of the bare model (the lifted one computes more);
- ``step_*``: training step through ``jl.lift`` / the same step with hand-written factors.

At the top: ``lifted_over_plain``, the largest ``total`` of all cases, and ``lifted_trace_ms``.
JAX's caches are cleared before every repetition; the first one does not count.
"""

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import encoder, timing


def measure(settings: timing.Settings) -> dict[str, Any]:
    config, params, _ = encoder.base(settings.quick)
    batch = encoder.batch(config, 2, 8)
    adapter = encoder.adapter(config, params)
    args = (params, adapter, batch.ids, batch.mask)
    step_args = (params, adapter, *encoder.state(adapter, encoder.head(params)), batch)
    lifted = {"scanned": encoder.lifted, "unrolled": encoder.lifted_unrolled}
    plain = {"scanned": encoder.plain, "unrolled": encoder.unrolled}
    hand = {"scanned": encoder.factored, "unrolled": lambda c: encoder.unrolled(c, low=True)}
    figures: dict[str, Any] = {}
    for form in lifted:
        ours = lifted[form](config)
        pairs = {
            "forward": (ours, plain[form](config), args),
            "step": (encoder.step(ours), encoder.step(hand[form](config)), step_args),
        }
        for kind, (fn, peer, inputs) in pairs.items():
            figures[f"{kind}_{form}"] = _pair(fn, peer, inputs, settings, f"{kind}_{form}")
    return {
        "lifted_over_plain": max(f["total"] for f in figures.values()),
        "lifted_trace_ms": {k: f["ms"]["lifted"]["trace"] for k, f in figures.items()},
    } | figures


def _pair(fn: Any, peer: Any, args: Any, settings: timing.Settings, label: str) -> dict[str, Any]:
    split: dict[str, list[tuple[float, float]]] = {"lifted": [], "plain": []}
    for turn in range(int(settings.quick), (1 if settings.quick else settings.count(3)) + 1):
        for name, function in (("lifted", fn), ("plain", peer))[:: 1 if turn % 2 else -1]:
            times = _stages(function, args, settings.clock)
            if turn:
                split[name].append(times)
    ms = {
        name: {
            "trace": 1e3 * min(t for t, _ in times),
            "compile": 1e3 * min(c for _, c in times),
            "total": 1e3 * min(t + c for t, c in times),
        }
        for name, times in split.items()
    }
    timing.note(
        f"trace_time {label}: " + "  ".join(f"{k} {v['total']:.0f} ms" for k, v in ms.items())
    )
    return {k: ms["lifted"][k] / ms["plain"][k] for k in ms["plain"]} | {"ms": ms}


def _stages(function: Callable, args: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds to trace and to compile, from empty caches."""
    jax.clear_caches()
    start = clock()
    lowered = jax.jit(function).lower(*args)
    middle = clock()
    lowered.compile()
    return middle - start, clock() - middle


if __name__ == "__main__":
    timing.main("trace_time", measure, threads=(1,))

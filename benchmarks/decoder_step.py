r"""LoRA train step and decoding of SmolLM2-135M: jlora, hand-written JAX, torch with PEFT.

``python -m benchmarks.decoder_step``; per size ``{rows}x{tokens}`` and, as the worst of the sizes,
at the top: ``ratio_vs_peft``, ``ratio_vs_hand`` (peer time / jlora time), ``memory_vs_hand`` (XLA's
temporary memory of the step, peer / jlora), ``memory_vs_peft`` (peak resident memory of a step
above what is held between steps, jlora / peer). ``decode_over_base`` is the time of a greedily
decoded token with an adapter over that of the bare model, both by the same jitted loop.

Activations are kept as autodiff keeps them, in all three: no checkpointing.
"""

from typing import Any

from benchmarks import decoder, peers, timing


def measure(settings: timing.Settings) -> dict[str, Any]:
    base = decoder.base(settings.quick)
    sizes = [(2, 8), (1, 16)] if settings.quick else [(1, 512), (4, 128)]
    figures: dict[str, Any] = {f"{b}x{t}": _size(base, b, t, settings) for b, t in sizes}
    each = list(figures.values())
    worst = {k: min(f[k] for f in each) for k in each[0] if k.startswith("ratio_")}
    worst["memory_vs_hand"] = min(f["memory_vs_hand"] for f in each)
    worst["memory_vs_peft"] = max(f["memory_vs_peft"] for f in each)
    return worst | _decode(base, settings) | figures


def _size(base: decoder.Base, rows: int, tokens: int, settings: timing.Settings) -> dict[str, Any]:
    config, params, _ = base
    ids, adapter = decoder.batch(config, rows, tokens), decoder.adapter(base)
    forwards = {"jlora": decoder.lifted(config), "hand": decoder.factored(config)}
    steps = {k: decoder.Stepper(f, params, adapter, ids) for k, f in forwards.items()}
    train = decoder.trainer(base, adapter, ids, settings.threads)
    difference = peers.agree(steps["jlora"].train, train)
    peers.agree(lambda: steps["hand"].train(), _losses(steps["jlora"], 3))
    runs: dict[str, Any] = {k: s.run for k, s in steps.items()} | {"peft": train}
    label = f"decoder_step {rows}x{tokens}"
    seconds = timing.interleave(runs, settings.count(12), settings, label, limit=240, warm=1)
    ms, temp = timing.best(seconds), {k: s.temp_mib for k, s in steps.items()}
    held = {k: timing.transient_mib(run) for k, run in runs.items()}
    return {
        "ratio_vs_peft": ms["peft"] / ms["jlora"],
        "ratio_vs_hand": ms["hand"] / ms["jlora"],
        "memory_vs_hand": temp["hand"] / temp["jlora"],
        "memory_vs_peft": _ratio(held["jlora"], held["peft"]),
        "ms": timing.spread(seconds),
        "xla_temp_mib": temp,
        "transient_mib": held,
        "loss_difference": difference,
    }


def _ratio(ours: float | None, theirs: float | None) -> float:
    """NaN where the kernel does not tell the peak; theirs counts as a kibibyte at least."""
    if ours is None or theirs is None:
        return float("nan")
    return ours / max(theirs, 1e-3)


def _losses(stepper: decoder.Stepper, count: int) -> Any:
    """The losses of a training from the start, one per call."""
    stepper._now = stepper.start
    values = iter([float(stepper.train()) for _ in range(count)])
    return lambda: next(values)


def _decode(base: decoder.Base, settings: timing.Settings) -> dict[str, Any]:
    config, params, _ = base
    adapter, steps = decoder.adapter(base), 4 if settings.quick else 32
    prompt = decoder.batch(config, 4, 4 if settings.quick else 16)
    compiled = {
        name: decoder.generator(config, prompt, steps, name == "lifted")
        for name in ("lifted", "bare")
    }
    runs = {k: lambda f=f: f(params, adapter).ids.block_until_ready() for k, f in compiled.items()}
    seconds = timing.interleave(runs, settings.count(20), settings, "decode", limit=120)
    ms = timing.best(seconds)
    return {
        "decode_over_base": ms["lifted"] / ms["bare"],
        "decode_ms_per_token": {k: v / steps for k, v in ms.items()},
    }


if __name__ == "__main__":
    timing.main("decoder_step", measure, keep=True)

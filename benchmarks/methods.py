r"""What each method costs over LoRA, and over PEFT's version of it: train steps on MiniLM-L6.

``python -m benchmarks.methods``; per method, at 4 x 64 tokens with sizes that train about as many
numbers as LoRA of rank 8 (some cannot: ``numbers`` says how many per adapter):

- ``over_lora``: time of its step / time of LoRA's;
- ``ratio_vs_peft``: time of PEFT's step / time of its step, both with equal losses; null where PEFT
  has no file of it that needs no base weights, ``without_peft`` says why;
- ``memory_over_lora``: temporary memory by XLA's analysis, over LoRA's;
- ``flops_over_lora``: operations by XLA's analysis before it optimises, layers unrolled.

All steps are of one process, interleaved. Operations bound what a better kernel could save: where
``flops_over_lora`` is above 1.3, so is any step of that equation.
"""

from typing import Any

import jax

from benchmarks import encoder, peers, timing
from jlora import methods as weights

METHODS: dict[str, Any] = {  # per kernel of 384 x 384; LoRA of rank 8 trains 6,144 numbers
    "LoRA": weights.LoRA(8, 16.0),
    "DoRA": weights.DoRA(8, 16.0),
    "AdaLoRA": weights.AdaLoRA(8, 16.0),
    "LoHa": weights.LoHa(4, 8.0),
    "LoKr": weights.LoKr(8, 16.0),
    "HiRA": weights.HiRA(8),
    "DeLoRA": weights.DeLoRA(8),
    "GraLoRA": weights.GraLoRA(8, 16.0),
    "MiSS": weights.MiSS(16),
    "BAT": weights.BAT(16),
    "C3A": weights.C3A(24),
    "HRA": weights.HRA(16),
    "OFT": weights.OFT(32),
    "BOFT": weights.BOFT(16),
    "RoAd": weights.RoAd(),
    "IA3": weights.IA3("out"),
    "VeRA": weights.VeRA(256),
    "VBLoRA": weights.VBLoRA(4, 160, 128),
    "UniLoRA": weights.UniLoRA(8, 65536),
    "RandLoRA": weights.RandLoRA(32, 640.0),
    "FourierFT": weights.FourierFT(6144),
    "WaveFT": weights.WaveFT(6144),
    "SHiRA": weights.SHiRA(8),
    "PEANuT": weights.PEANuT(8),
    "DEFT": weights.DEFT(8),
    "LoRAXS": weights.LoRAXS(78),
    "LoLDU": weights.LoLDU(64),
    "NOLA": weights.NOLA(8, 16.0, bases=256),
}
QUICK: dict[str, Any] = {  # of the tiny encoder, whose kernels are 16 x 16
    "LoRA": weights.LoRA(2), "HRA": weights.HRA(2), "LoRAXS": weights.LoRAXS(2),
}  # fmt: skip


def measure(settings: timing.Settings) -> dict[str, Any]:
    base, methods = encoder.base(settings.quick), QUICK if settings.quick else METHODS
    rows, tokens = (2, 8) if settings.quick else (4, 64)
    batch = encoder.batch(base.config, rows, tokens)
    runs, figures = {}, {}
    for name, method in methods.items():
        adapter = encoder.adapter(base.config, base.params, method)
        ours = encoder.Stepper(encoder.lifted(base.config), base.params, adapter, batch)
        runs[name] = ours.run
        figures[name] = {
            "numbers": sum(x.size for x in jax.tree.leaves(adapter.trainable)),
            "memory_mib": ours.temp_mib,
            "flops": _flops(base, adapter, batch),
        }
        try:
            theirs = peers.peft(base, [adapter], settings.threads)
        except ValueError as error:  # a file that PEFT cannot have, or needs the base for
            figures[name] |= {"without_peft": str(error).partition(": ")[2].partition(";")[0]}
            continue
        train, data = peers.trainer(theirs, encoder.head(base.params)), peers.batch(batch)
        figures[name]["loss_difference"] = peers.agree(ours.train, lambda t=train, d=data: t(d))
        runs[f"peft_{name}"] = lambda t=train, d=data: t(d)
        timing.note(f"methods: {name}", end="\r")
    limit = 600.0
    seconds = timing.interleave(runs, settings.count(20), settings, "methods", limit=limit)
    ms = timing.best(seconds)
    for name, one in figures.items():
        peft = ms.get(f"peft_{name}")
        one |= {
            "ms": ms[name],
            "over_lora": ms[name] / ms["LoRA"],
            "ratio_vs_peft": peft / ms[name] if peft else None,
            "memory_over_lora": one["memory_mib"] / figures["LoRA"]["memory_mib"],
            "flops_over_lora": one["flops"] / figures["LoRA"]["flops"],
        }
    return figures


def _flops(base: encoder.Base, adapter: Any, batch: encoder.Batch) -> float:
    step = encoder.step(encoder.lifted_unrolled(base.config))
    start = encoder.state(adapter, encoder.head(base.params))
    analysis: Any = jax.jit(step).lower(base.params, adapter, *start, batch).cost_analysis()
    return analysis["flops"]


if __name__ == "__main__":
    timing.main("methods", measure, keep=True)

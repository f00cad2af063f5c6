r"""LoRA train step on MiniLM-L6: jlora, hand-written JAX, merge-in-loss JAX, torch with PEFT.

``python -m benchmarks.lora_step``; per size ``{rows}x{tokens}`` and, as the worst of the sizes, at
the top: ``ratio_vs_peft``, ``ratio_vs_hand``, ``ratio_vs_merge`` (peer time / jlora time),
``memory_vs_hand``, ``memory_vs_merge`` (peer / jlora, XLA's temporary memory of the step).

The bare products of the two stacks are measured alongside it: ``matmul_ratio`` is torch's time for
the step's dense products over XLA's. Where it is far from 1 (torch's MKL takes a slow path on CPUs
of other makers) ``ratio_vs_peft`` says more about the two matrix libraries than about adapters;
``ratio_vs_peft_equal_matmul`` therefore gives torch XLA's time for those products:

.. math:: (t_{\mathrm{peft}} - m_{\mathrm{torch}} + m_{\mathrm{xla}}) / t_{\mathrm{jlora}}

``transient_mib`` is the peak resident memory of a step above what is held between steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import encoder, peers, timing


def measure(settings: timing.Settings) -> dict[str, Any]:
    base = encoder.base(settings.quick)
    sizes = [(4, 8), (2, 4)] if settings.quick else [(16, 64), (2, 32)]
    figures: dict[str, Any] = {f"{b}x{t}": _size(base, b, t, settings) for b, t in sizes}
    ratios = [k for k in next(iter(figures.values())) if k.startswith(("ratio_", "memory_"))]
    return {k: min(f[k] for f in figures.values()) for k in ratios} | figures


def _size(base: encoder.Base, rows: int, tokens: int, settings: timing.Settings) -> dict[str, Any]:
    config, params, _ = base
    batch, adapter = encoder.batch(config, rows, tokens), encoder.adapter(config, params)
    forwards = {
        "jlora": encoder.lifted(config),
        "hand": encoder.factored(config),
        "merge": encoder.merged(config),
    }
    steps = {k: encoder.Stepper(f, params, adapter, batch) for k, f in forwards.items()}
    train = peers.trainer(peers.peft(base, [adapter], settings.threads), encoder.head(params))
    data = peers.batch(batch)
    difference = peers.agree(steps["jlora"].train, lambda: train(data))
    runs = {k: s.run for k, s in steps.items()} | {"peft": lambda: train(data)}
    label = f"lora_step {rows}x{tokens}"
    seconds = timing.interleave(
        runs, settings.count(80 if rows > 4 else 150), settings, label, limit=120
    )
    ms, products = timing.best(seconds), _products(config, rows * tokens, settings)
    equal = ms["peft"] - products["torch"] + products["xla"]
    temp = {k: s.temp_mib for k, s in steps.items()}
    return {
        "ratio_vs_peft": ms["peft"] / ms["jlora"],
        "ratio_vs_peft_equal_matmul": equal / ms["jlora"],
        "ratio_vs_hand": ms["hand"] / ms["jlora"],
        "ratio_vs_merge": ms["merge"] / ms["jlora"],
        "memory_vs_hand": temp["hand"] / temp["jlora"],
        "memory_vs_merge": temp["merge"] / temp["jlora"],
        "matmul_ratio": products["torch"] / products["xla"],
        "matmul_ms": products,
        "ms": timing.spread(seconds),
        "xla_temp_mib": temp,
        "transient_mib": {k: timing.transient_mib(run) for k, run in runs.items()},
        "loss_difference": difference,
    }


def _products(config: Any, tokens: int, settings: timing.Settings) -> dict[str, float]:
    """Milliseconds of the dense products of one step (forward and input gradient), alone."""
    d, f = config.width, config.ffn
    shapes = {(d, d): 8, (d, f): 2, (f, d): 2}  # [in, out]: how many a layer
    multiply = jax.jit(lambda x, w: x @ w)
    total = {"xla": 0.0, "torch": 0.0}
    for (n, m), times in shapes.items():
        x, w = jnp.ones((tokens, n)), jnp.ones((n, m)) / n
        tx, tw = torch.ones(tokens, n), torch.ones(m, n) / n
        runs = {
            "xla": lambda x=x, w=w: _repeat(multiply, x, w).block_until_ready(),
            "torch": lambda x=tx, w=tw: _repeat(torch.nn.functional.linear, x, w),
        }
        label = f"product {tokens}x{n}x{m}"
        ms = timing.best(timing.interleave(runs, settings.count(15), settings, label))
        total = {k: total[k] + config.layers * times * ms[k] / REPEAT for k in total}
    return total


REPEAT = 8  # products a call: one is too short for the clock


def _repeat(fn: Any, x: Any, w: Any) -> Any:
    for _ in range(REPEAT - 1):
        fn(x, w)
    return fn(x, w)


if __name__ == "__main__":
    timing.main("lora_step", measure, keep=True)

r"""What DoRA costs over LoRA, in jlora and in PEFT: train steps on MiniLM-L6.

``python -m benchmarks.dora_step``; per size and, as the worst of the sizes, at the top:
``dora_over_lora`` (jlora's DoRA time / its LoRA time), ``extra_ratio_vs_peft``,

.. math::
    (t^{\mathrm{peft}}_{\mathrm{dora}} - t^{\mathrm{peft}}_{\mathrm{lora}}) /
    (t^{\mathrm{jlora}}_{\mathrm{dora}} - t^{\mathrm{jlora}}_{\mathrm{lora}}),

``extra_ratio_of_medians``, the same of the medians (per size only; these are differences of 10 of
500 ms, and one lucky repetition bends a minimum by that), ``extra_ratio_at_best``, the first with
LoRA's output times a trained gain and no norms (`Gain`) in our place, which DoRA cannot pass but by
noise, and ``ratio_vs_peft``, PEFT's DoRA time / jlora's. jlora takes the column norms in closed
form from the factors, PEFT makes the dense product in every step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jlora as jl
from benchmarks import encoder, peers, timing


@dataclasses.dataclass(frozen=True)
class Gain(jl.LoRA):
    """y = (x W + s x A B) diag(g), g [d_out] trained from one: DoRA without its norms."""

    def init(self, key: jax.Array, site: Any, context: Any) -> Any:
        trainable, frozen = super().init(key, site, context)
        return trainable | {"g": jnp.ones(site.d_out, site.param_dtype)}, frozen

    def apply(self, x: Any, w: Any, p: Any, ctx: Any) -> Any:
        y = super().apply(x, w, p, ctx)
        return y * p["g"].astype(y.dtype).reshape(*[1] * (y.ndim - 1), -1)


def measure(settings: timing.Settings) -> dict[str, Any]:
    base = encoder.base(settings.quick)
    sizes = [(4, 8)] if settings.quick else [(16, 64), (2, 32)]
    figures: dict[str, Any] = {f"{b}x{t}": _size(base, b, t, settings) for b, t in sizes}
    each = list(figures.values())
    return {
        "dora_over_lora": max(f["dora_over_lora"] for f in each),
        "extra_ratio_vs_peft": min(f["extra_ratio_vs_peft"] for f in each),
        "extra_ratio_at_best": min(f["extra_ratio_at_best"] for f in each),
        "ratio_vs_peft": min(f["ratio_vs_peft"] for f in each),
    } | figures


def _size(base: encoder.Base, rows: int, tokens: int, settings: timing.Settings) -> dict[str, Any]:
    config, params, _ = base
    batch, runs, temp, difference = encoder.batch(config, rows, tokens), {}, {}, 0.0
    methods = {
        "lora": jl.LoRA(encoder.RANK, encoder.ALPHA),
        "dora": jl.DoRA(encoder.RANK, encoder.ALPHA),
    }
    data = peers.batch(batch)
    for name, method in methods.items():
        adapter = encoder.adapter(config, params, method)
        ours = encoder.Stepper(encoder.lifted(config), params, adapter, batch)
        peft = peers.peft(base, [adapter], settings.threads)
        train = peers.trainer(peft, encoder.head(params))
        difference = max(difference, peers.agree(ours.train, lambda t=train: t(data)))
        runs[name], runs[f"peft_{name}"] = ours.run, lambda t=train: t(data)
        temp[name] = ours.temp_mib
    gain = encoder.adapter(config, params, Gain(encoder.RANK, encoder.ALPHA))
    runs["gain"] = encoder.Stepper(encoder.lifted(config), params, gain, batch).run
    label = f"dora_step {rows}x{tokens}"
    seconds = timing.interleave(
        runs, settings.count(80 if rows > 4 else 150), settings, label, limit=180
    )
    ms = timing.best(seconds)
    spread = timing.spread(seconds)
    ours, theirs = ms["dora"] - ms["lora"], ms["peft_dora"] - ms["peft_lora"]
    middle = {name: values[2] for name, values in spread.items()}
    usual = [middle[f"{who}dora"] - middle[f"{who}lora"] for who in ("peft_", "")]
    least = ms["gain"] - ms["lora"]
    return {
        "dora_over_lora": ms["dora"] / ms["lora"],
        "extra_ratio_vs_peft": timing.ratio_of_extras(theirs, ours, ms["lora"]),
        "extra_ratio_of_medians": timing.ratio_of_extras(*usual, middle["lora"]),
        "extra_ratio_at_best": timing.ratio_of_extras(theirs, least, ms["lora"]),
        "ratio_vs_peft": ms["peft_dora"] / ms["dora"],
        "extra_ms": {"jlora": ours, "gain": least, "peft": theirs},
        "ms": spread,
        "xla_temp_mib": temp,
        "loss_difference": difference,
    }


if __name__ == "__main__":
    timing.main("dora_step", measure, keep=True)

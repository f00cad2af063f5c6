r"""Operations and temporary memory of a LoRA train step, by XLA's own analysis.

``python -m benchmarks.flops``: MiniLM-L6 at 16 x 64 tokens, layers unrolled (XLA counts the body of
a loop once). With T tokens, over the dense weights and over the adapted ones,

.. math:: u = \sum 2 T d_{in} d_{out}, \qquad v = \sum 2 T r (d_{in} + d_{out}),

a step must provide 2u + 3v: forward and input gradient of the frozen weights; forward, input and
weight gradient of the factors. The attention products (``attention``, three times their forward)
come on top for everybody. ``over_bound`` = FLOPs / (2u + 3v + attention) - 1, to be at most 0.05:
what is left are the element-wise operations, and what it lacks is the input gradient of the first
layer, which nobody needs. ``merge_over_bound`` is the same of merging inside the loss,
``hand_over_bound`` of hand-written factors; ``dense_weight_gradients`` counts products of the step
whose result has the shape of an adapted weight (0: no dense gradient). ``xla_temp_mib``: temporary
memory of the scanned step.
"""

from typing import Any

import jax

from benchmarks import encoder, timing


def measure(settings: timing.Settings) -> dict[str, Any]:
    config, params, _ = encoder.base(settings.quick)
    rows, tokens = (4, 8) if settings.quick else (16, 64)
    batch, adapter = encoder.batch(config, rows, tokens), encoder.adapter(config, params)
    d, f, t = config.width, config.ffn, rows * tokens
    u = config.layers * 2 * t * (4 * d * d + 2 * d * f)
    v = config.layers * 2 * (2 * t * encoder.RANK * (d + d))
    attention = config.layers * 3 * (2 * 2 * t * tokens * d)
    bound = 2 * u + 3 * v + attention
    forms = {
        "jlora": (encoder.lifted_unrolled, encoder.lifted),
        "hand": (lambda c: encoder.unrolled(c, low=True), encoder.factored),
        "merge": (encoder.merged_unrolled, encoder.merged),
    }
    flops, temp, dense = {}, {}, {}
    for name, (unrolled, scanned) in forms.items():
        timing.note(f"flops: {name}")
        flops[name], dense[name] = _count(unrolled(config), params, adapter, batch, d)
        temp[name] = encoder.Stepper(scanned(config), params, adapter, batch).temp_mib
    return {
        "over_bound": flops["jlora"] / bound - 1,
        "hand_over_bound": flops["hand"] / bound - 1,
        "merge_over_bound": flops["merge"] / bound - 1,
        "merge_over_jlora": flops["merge"] / flops["jlora"],
        "dense_weight_gradients": dense["jlora"],
        "merge_dense_weight_gradients": dense["merge"],
        "gflop": {k: x / 1e9 for k, x in flops.items()},
        "bound_gflop": {"u": u / 1e9, "v": v / 1e9, "attention": attention / 1e9},
        "xla_temp_mib": temp,
        "memory_vs_merge": temp["merge"] / temp["jlora"],
    }


def _count(forward: Any, params: Any, adapter: Any, batch: Any, d: int) -> tuple[float, int]:
    """(FLOPs of a step by XLA, products in it that make a [d, d] matrix)."""
    args = (params, adapter, *encoder.state(adapter, encoder.head(params)), batch)
    step = encoder.step(forward)
    equations = jax.make_jaxpr(step)(*args).jaxpr.eqns
    dense = [e for e in equations if e.primitive.name == "dot_general"]
    shapes = [tuple(e.outvars[0].aval.shape) for e in dense]
    analysis = jax.jit(step).lower(*args).compile().cost_analysis()
    return float(analysis["flops"]), sum(shape[-2:] == (d, d) for shape in shapes)


if __name__ == "__main__":
    timing.main("flops", measure, threads=(1,))

r"""Training 16 adapters at once over one base, against one after the other.

``python -m benchmarks.many_adapters``: each adapter has its own batch of 2 x 32 tokens, its own
head and its own optimizer state. ``ratio_vs_sequential``: jlora's 16 steps in sequence (one
compiled function, called 16 times) / its one step of ``jax.vmap`` over the bank;
``ratio_vs_peft``: PEFT's 16 steps in sequence (one model, ``set_adapter``) / the same.

``ratio_at_best`` is what no batching can pass but by noise: the same steps in sequence / one step
of ONE adapter on all tokens, where every product has its largest form.

``base_copies`` is the number of times the base lies in the arguments of the step at once, by XLA's
analysis: (arguments - bank - optimizer - batches) / base. ``temp_over_sequential`` is the
temporary memory of 16 at once over that of one.
"""

from typing import Any

import jax
import jax.numpy as jnp

import jlora as jl
from benchmarks import encoder, peers, timing


def measure(settings: timing.Settings) -> dict[str, Any]:
    base = encoder.base(settings.quick)
    config, params, _ = base
    count, rows, tokens = (3, 2, 4) if settings.quick else (16, 2, 32)
    adapters = [encoder.adapter(config, params, seed=k) for k in range(count)]
    heads = [encoder.head(params, seed=k) for k in range(count)]
    batches = [encoder.batch(config, rows, tokens, seed=k) for k in range(count)]
    states = [encoder.state(a, h) for a, h in zip(adapters, heads, strict=True)]
    each = list(zip(adapters, states, batches, strict=True))

    one = encoder.step(encoder.lifted(config))
    single = jax.jit(one).lower(params, adapters[0], *states[0], batches[0]).compile()
    bank = jl.stack(adapters)
    trained, optimizer, data = (
        jax.tree.map(lambda *t: jnp.stack(t), *parts)
        for parts in ([s[0] for s in states], [s[1] for s in states], batches)
    )
    many = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)))
    together = many.lower(params, bank, trained, optimizer, data).compile()
    whole = encoder.batch(config, count * rows, tokens)
    best = encoder.Stepper(encoder.lifted(config), params, adapters[0], whole)
    model = peers.peft(base, adapters, settings.threads)
    trainers = [peers.trainer(model, h, f"a{k}") for k, h in enumerate(heads)]
    tensors = [peers.batch(b) for b in batches]

    def ours():
        return together(params, bank, trained, optimizer, data)[2]

    def sequence():
        return [single(params, a, *s, b)[2] for a, s, b in each]

    def theirs():
        losses = []
        for k, (train, batch) in enumerate(zip(trainers, tensors, strict=True)):
            model.set_adapter(f"a{k}")
            losses.append(train(batch))
        return losses

    peers.agree(lambda: sum(ours()), lambda: sum(theirs()), steps=1)
    runs = {
        "together": lambda: jax.block_until_ready(ours()),
        "sequence": lambda: jax.block_until_ready(sequence()),
        "one_adapter": best.run,
        "peft": theirs,
    }
    seconds = timing.interleave(runs, settings.count(50), settings, "many_adapters", limit=120)
    ms, memory = timing.best(seconds), together.memory_analysis()
    others = _bytes((bank.frozen, trained, optimizer, data))
    temp = single.memory_analysis().temp_size_in_bytes
    return {
        "ratio_vs_sequential": ms["sequence"] / ms["together"],
        "ratio_vs_peft": ms["peft"] / ms["together"],
        "ratio_at_best": ms["sequence"] / ms["one_adapter"],
        "base_copies": (memory.argument_size_in_bytes - others) / _bytes(params),
        "temp_over_sequential": memory.temp_size_in_bytes / temp,
        "adapters": count,
        "ms": timing.spread(seconds),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    timing.main("many_adapters", measure, keep=True)

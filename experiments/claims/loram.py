"""LoRAM: LoRA trained on half of the units is better on the full layers than on the pruned ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_pruning as lib
from experiments.claims.protocol import Claim, Figures
from jlora.pruning import loram, slicing

STEPS, RATES = 60, (1e-3, 3e-3, 9e-3)
MASKS = 7  # seed of the draw of units, the same for all
PLAIN = lib.lib.Recipe("LoRA of the pruned layers", {}, steps=STEPS)
LOST = lib.lib.Recipe("the same, shuffled labels", {}, steps=STEPS, shuffled=True)


@functools.cache
def pruned(bits, workdir):
    """The tasks on sliced layers, quantised where `bits` says so, and the masks."""
    found, groups, small, _ = lib.bench(workdir)
    kept = loram.drawn(jax.random.key(MASKS), groups, lib.HALF)
    base = slicing.sliced(found.base, groups, kept)
    if bits:
        base = jax.tree_util.tree_map_with_path(
            lambda path, x: jl.quantize(x, bits) if path[-1].key == "kernel" else x, base
        )
    return found._replace(apply=small, base=base), kept


@functools.cache
def trained(recipe, rate, bits, seed, workdir):
    """Lanes of LoRA on the pruned layers."""
    at, _ = pruned(bits, workdir)
    return _lanes(at, recipe, rate, seed)


def _lanes(at, recipe, rate, seed):
    adapter, every = lib.fresh(at, seed), np.arange(len(at.names))
    made = lib.lib.train(at, recipe, adapter, np.full(len(every), rate), every, seed)
    return adapter.replace(trainable=made.trainable)


def recovered(lanes, workdir):
    """The lanes for the full layers."""
    _, groups, *_ = lib.bench(workdir)
    _, kept = pruned(0, workdir)
    own = [lanes.replace(trainable=jax.tree.map(lambda x, i=i: x[i], lanes.trainable))
           for i in range(len(lib.bench(workdir).found.names))]  # fmt: skip
    full = [loram.recovered(a, groups, kept) for a in own]
    return full[0].replace(
        trainable=jax.tree.map(lambda *xs: jnp.stack(xs), *(a.trainable for a in full))
    )


@functools.cache
def best(bits, workdir):
    """The rate of the best validation accuracy of the recovered adapter."""
    found, score = lib.bench(workdir).found, {}
    for rate in RATES:
        lanes = trained(PLAIN, rate, bits, lib.lib.TUNING, workdir)
        score[rate] = lib.accuracy(found, recovered(lanes, workdir), "validation").mean()
    return max(score, key=score.__getitem__)


def memory(at):
    """Bytes that XLA plans for a gradient of LoRA: arguments, temporaries and results."""
    adapter, rows = lib.fresh(at, 0), at.index[0, : lib.lib.BATCH]
    heads = jnp.broadcast_to(at.heads[0], (lib.lib.BATCH, *at.heads.shape[1:]))

    def loss(one, base, hidden, mask, label):
        logits = jl.lift(at.apply)(base, adapter.replace(trainable=one), hidden, mask, heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    args = adapter.trainable, at.base, at.hidden[rows], at.mask[rows], at.label[0, : len(rows)]
    seen = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
    assert seen is not None  # of a CPU it is there
    return seen.argument_size_in_bytes + seen.temp_size_in_bytes + seen.output_size_in_bytes


@functools.cache
def sizes(workdir):
    """Memory of a gradient on pruned and quantised layers, over that on the full ones."""
    whole = memory(lib.bench(workdir).found)
    return {f"memory of a gradient, {name}": memory(pruned(bits, workdir)[0]) / whole
            for name, bits in (("pruned", 0), ("pruned, 8 bits", 8))}  # fmt: skip


def run(seed, workdir):
    """Test accuracy per task, one seed."""
    found, rate = lib.bench(workdir).found, best(0, workdir)
    small, _ = pruned(0, workdir)
    lanes = trained(PLAIN, rate, 0, seed, workdir)
    lost = trained(LOST, rate, 0, seed, workdir)
    packed = trained(PLAIN, rate, 8, seed, workdir)
    zero = lanes.replace(trainable=jax.tree.map(jnp.zeros_like, lanes.trainable))
    judged = {
        "recovered": lib.accuracy(found, recovered(lanes, workdir), "test"),
        "on the pruned layers": lib.accuracy(small, lanes, "test"),
        "shuffled labels": lib.accuracy(found, recovered(lost, workdir), "test"),
        "recovered from 8 bits": lib.accuracy(found, recovered(packed, workdir), "test"),
        "full layers without LoRA": lib.accuracy(found, recovered(zero, workdir), "test"),
        "LoRA trained on the full layers": lib.accuracy(
            found, _lanes(found, PLAIN, rate, seed), "test"),
    }  # fmt: skip
    more = {f"{n}: accuracy": float(x.mean()) for n, x in judged.items()} | sizes(workdir)
    more["rate"] = rate
    sides = ("recovered", "on the pruned layers", "shuffled labels")
    return Figures(found.names, *(tuple(judged[n].tolist()) for n in sides), more=more)


CLAIM = Claim(
    name="loram",
    systems=("LoRAM",),
    statement=f"test accuracy after {STEPS} steps of LoRA on the upper {lib.DEPTH} layers without "
    "a random half of their heads and columns: recovered, on the full layers > on the pruned ones",
    reference="Zhang 2025, 2502.13533: train small, infer large",
    baseline="the same adapter on the pruned layers that it was trained on",
    control="recovered after training on labels in random order",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)

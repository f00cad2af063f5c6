"""LISA: one full layer at a time, in no more than twice LoRA's optimizer state, to a lower loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.optimizers.lisa import layer_norms, lisa

DEPTH, RANK, SLOTS, INTERVAL, LAYERS = 4, 96, 1, 5, "^layers/"
RATES = (3e-5, 1e-4, 3e-4)  # the middle of the first three of full parameters
LORA = lib.lora(RANK, layers=DEPTH)


def solver(rate, full):
    """LISA, or AdamW on all layers, with the cosine of the other claims."""

    def cosine(n):
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * n / lib.lib.STEPS))

    return optax.adam(cosine) if full else lisa(cosine, LAYERS, slots=SLOTS, interval=INTERVAL)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(apply, full, found, rate, task, seed):
    rule = solver(rate, full)
    head = jnp.broadcast_to(found.heads[task], (lib.lib.BATCH, *found.heads[task].shape))

    def loss(params, rows):
        index, label = found.index[task][rows], found.label[task][rows]
        logits = apply(params, found.hidden[index], found.mask[index], head)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(carry, number):
        params, state = carry
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), number)
        rows = jax.random.randint(key, (lib.lib.BATCH,), 0, found.index.shape[1])
        value, grads = jax.value_and_grad(loss)(params, rows)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    with jax.numpy_dtype_promotion("standard"):
        begin = found.base, rule.init(found.base)
    numbers = jnp.arange(lib.lib.STEPS, dtype=jnp.int32)
    (params, _), losses = jax.lax.scan(step, begin, numbers)
    return params, losses[-lib.lib.LAST :].mean()


@functools.partial(jax.jit, static_argnums=0)
def _right(apply, base, hidden, mask, head, label):
    heads = jnp.broadcast_to(head, (hidden.shape[0], *head.shape))
    return apply(base, hidden, mask, heads).argmax(-1).astype(jnp.int32) == label


def trained(full, rate, seed, workdir, shuffled=False):
    """(training loss at the end, test accuracy, norms of the change per layer) per task."""
    found, out = lib.tasks(workdir, DEPTH), []
    if shuffled:
        draw = np.random.default_rng([seed, 5])
        found = found._replace(label=jnp.asarray(draw.permuted(np.asarray(found.label), axis=1)))
    data = found._replace(apply=None, names=())
    for task in range(len(found.names)):
        args = data, jnp.float32(rate), jnp.int32(task), jnp.int32(seed)
        params, loss = _train(found.apply, full, *args)
        index, label = (x[task] for x in found.test)
        hit = _right(found.apply, params, found.hidden[index], found.mask[index],
                     found.heads[task], label)  # fmt: skip
        change = jax.tree.map(jnp.subtract, params, found.base)
        out.append((float(loss), float(hit.mean()), np.asarray(layer_norms(change, LAYERS))))
    return tuple(np.asarray(x) for x in zip(*out, strict=True))


@functools.cache
def best(full, workdir):
    """The learning rate of the lowest training loss, at an inner point of the grid."""
    score, todo = {}, list(RATES)
    for _ in range(lib.lib.EXTENSIONS + 1):
        for rate in todo:
            loss = trained(full, rate, lib.lib.TUNING, workdir)[0].mean()
            score[rate] = float(np.nan_to_num(loss, nan=np.inf))
        low = min(score, key=score.__getitem__)
        if min(score) < low < max(score):
            break
        todo = [low * lib.lib.FACTOR if low == max(score) else low / lib.lib.FACTOR]
    return low


def lora_norms(adapter, workdir):
    """Norms of LoRA's change per layer, mean over tasks."""
    base, out = lib.tasks(workdir, DEPTH).base, []
    for task in range(len(lib.tasks(workdir, DEPTH).names)):
        own = jax.tree.map(lambda x, i=task: x[i], adapter.trainable)
        merged = jl.merge(base, adapter.replace(trainable=own))
        out.append(layer_norms(jax.tree.map(jnp.subtract, merged, base), LAYERS))
    return np.mean(out, axis=0)


def state_size(rule, params):
    """Numbers in an optimizer's state."""
    return sum(np.prod(t.shape) for t in jax.tree.leaves(jax.eval_shape(rule.init, params)))


def run(seed, workdir):
    """Training loss at the end per task, one seed."""
    found = lib.tasks(workdir, DEPTH)
    rate = best(False, workdir)
    loss, accuracy, norms = trained(False, rate, seed, workdir)
    plain = lib.trained(LORA, seed, workdir)
    control = trained(False, rate, seed, workdir, shuffled=True)[0]
    whole = trained(True, best(True, workdir), seed, workdir)
    with jax.numpy_dtype_promotion("standard"):
        sizes = [state_size(solver(1e-4, full), found.base) for full in (False, True)]
        other = state_size(optax.adam(1e-3), lib.fresh(LORA, seed, workdir).trainable)
    more = lib.about(LORA, seed, workdir) | {
        "LISA: rate": rate, "LISA: accuracy": float(accuracy.mean()),
        "full fine-tuning: training loss": float(whole[0].mean()),
        "full fine-tuning: accuracy": float(whole[1].mean()),
        "state of LISA over that of LoRA": float(sizes[0] / other),
        "state of full fine-tuning over that of LoRA": float(sizes[1] / other),
    }  # fmt: skip
    by_layer = (("LISA", norms.mean(0)), ("LoRA", lora_norms(plain.adapter, workdir)),
                ("full fine-tuning", whole[2].mean(0)))  # fmt: skip
    for name, values in by_layer:
        more |= {f"{name}: norm of the change of layer {k}": float(v) for k, v in enumerate(values)}
    sides = (tuple(x.tolist()) for x in (loss, plain.loss, control))
    return Figures(found.names, *sides, more=more)


CLAIM = Claim(
    name="lisa",
    systems=("LISA",),
    statement=f"training loss after {lib.lib.STEPS} steps: LISA, {SLOTS} of {DEPTH} layers for "
    f"{INTERVAL} steps each < LoRA of rank {RANK}, whose state is at least half as large",
    reference="Pan 2024, 2403.17919: a lower loss than LoRA in as little memory",
    baseline=f"LoRA of rank {RANK} on the attention kernels of all {DEPTH} layers",
    control="LISA on training labels in random order",
    unit="loss",
    assets=lib.lib.ASSETS,
    run=run,
    less_is_better=True,
)

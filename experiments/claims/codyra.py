r"""CoDyRA: a stream of tasks, each in the few ranks that it needs, against one LoRA for all.

Four corpora are learned one after the other, four more are never trained on. The class vectors are
texts, so the model answers on those too: how much worse than before is what it has forgotten.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_merges, text_training
from experiments.claims.protocol import Claim, Figures
from jlora.schedules import codyra, sora

RANK, STEPS, STREAM, BATCH = 16, 60, 4, 8
# The paper's script has 500 steps at 5e-3: as large a sum of thresholds in as many steps as here.
RAMP = codyra.Ramp(largest=5e-2, dense=30, rise=5)
RATES, TUNING, TRAIN_ROWS = (1.7e-3, 5e-3, 1.5e-2), 1000, 64
METHOD = jl.LoRA(rank=RANK, alpha=float(RANK))


def fresh(found, base, seed, gates):
    """LoRA, or its gated form, for the present weights."""
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    methods = dict.fromkeys(text_training.SITES, METHOD)
    made = jl.init(jax.random.key(seed), found.apply, base, *example, methods=methods)
    return sora.gated(jax.random.key(seed + 1), made) if gates else made


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(apply, sites, gates, found, base, trainable, frozen, rate, task, seed):
    model = jl.lift(apply)
    rule = optax.adam(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / STEPS)))
    rule = optax.chain(rule, codyra.proximal(RAMP)) if gates else rule
    head = jnp.broadcast_to(found.heads[task], (BATCH, *found.heads[task].shape))

    def loss(one, rows):
        index, label = found.index[task][rows], found.label[task][rows]
        adapter = jl.Adapter(one, frozen, sites)
        logits = model(base, adapter, found.hidden[index], found.mask[index], head)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(carry, key):
        one, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, found.index.shape[1])
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(jax.grad(loss)(one, rows), state, one)
        return (optax.apply_updates(one, updates), state), None

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), task), STEPS)
    with jax.numpy_dtype_promotion("standard"):
        begin = trainable, rule.init(trainable)
    return jax.lax.scan(step, begin, keys)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def _right(apply, base, hidden, mask, head, label):
    heads = jnp.broadcast_to(head, (hidden.shape[0], *head.shape))
    return apply(base, hidden, mask, heads).argmax(-1).astype(jnp.int32) == label


def scores(found, base, training=False):
    """Accuracy of merged weights on every task: on test rows, or on some training rows."""
    out = []
    for task in range(len(found.names)):
        if training:
            index, label = found.index[task][:TRAIN_ROWS], found.label[task][:TRAIN_ROWS]
            inputs, count = (found.hidden[index], found.mask[index]), TRAIN_ROWS
        else:
            inputs = tuple(x[task] for x in found.test[0][:2])
            label, count = found.test[1][task], found.test[2][task]
        hit = _right(found.apply, base, *inputs, found.heads[task], label)
        out.append(float(np.asarray(hit)[:count].mean()))
    return np.asarray(out)


def stream(found, gates, rate, seed):
    """(weights after each task, share of ranks left per task)."""
    base, adapter, out, left = found.base, fresh(found, found.base, seed, gates), [], []
    data = found._replace(apply=None, names=(), test=None)
    for task in range(STREAM):
        if gates and task:
            adapter = fresh(found, base, seed + 10 * task, gates)
        args = data, base, adapter.trainable, adapter.frozen, rate, jnp.int32(task), seed
        adapter = adapter.replace(trainable=_fit(found.apply, adapter.sites, gates, *args))
        if gates:
            masks = sora.open_gates(adapter).values()
            left.append(float(np.mean([np.asarray(m).mean() for m in masks])))
            base = codyra.absorb(base, adapter)
        out.append(base if gates else jl.merge(base, adapter))
    return out, left


@functools.cache
def best(gates, workdir):
    """The learning rate of the best mean accuracy on training rows after the stream."""
    found, score = text_training.tasks(workdir), {}
    for rate in RATES:
        after = stream(found, gates, rate, TUNING)[0][-1]
        score[rate] = scores(found, after, training=True)[:STREAM].mean()
    return max(score, key=score.__getitem__)


def run(seed, workdir):
    """Test accuracy on the tasks of the stream after the last one, one seed."""
    found = text_training.tasks(workdir)
    before, sides, more = scores(found, found.base), [], {}
    for name, gates in (("CoDyRA", True), ("sequential LoRA", False)):
        steps, left = stream(found, gates, best(gates, workdir), seed)
        after = [scores(found, base) for base in steps]
        sides.append(after[-1][:STREAM])
        own = np.mean([after[k][k] for k in range(STREAM)])
        more |= {f"{name}: rate": best(gates, workdir),
                 f"{name}: accuracy right after each task": float(own),
                 f"{name}: accuracy after the stream": float(sides[-1].mean()),
                 f"{name}: drop on tasks never trained": float(
                     (before - after[-1])[STREAM:].mean())}  # fmt: skip
        more |= {f"{name}: share of ranks left, task {k}": x for k, x in enumerate(left)}
    more["base model: accuracy on the stream"] = float(before[:STREAM].mean())
    more["base model: accuracy on tasks never trained"] = float(before[STREAM:].mean())
    lost = text_training.shuffled(found, seed)
    control = scores(found, stream(lost, True, best(True, workdir), seed)[0][-1])[:STREAM]
    sides = [tuple(x.tolist()) for x in (*sides, control)]
    return Figures(found.names[:STREAM], *sides, more=more)


CLAIM = Claim(
    name="codyra",
    systems=("CoDyRA",),
    statement="test accuracy on four text tasks after the last of them: CoDyRA > sequential LoRA "
    "of as many ranks + 3 points",
    reference="Lu 2024, 2412.01004: better at the end of the stream, with less zero-shot loss",
    baseline=f"one LoRA of rank {RANK}, trained on one task after the other",
    control="CoDyRA on training labels in random order",
    unit="accuracy",
    assets=text_merges.ASSETS,
    run=run,
    margin=0.03,
)

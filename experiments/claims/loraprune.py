"""LoRAPrune: units chosen by the gradients of LoRA, against magnitude and chance, at one half."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_pruning as lib
from experiments.claims.protocol import Claim, Figures
from jlora.pruning import loram, loraprune, slicing

STEPS, RATES = 80, (1e-3, 3e-3, 9e-3)
OURS, WEIGHTS, MERGED, CHANCE = "LoRA gradient", "magnitude", "magnitude with LoRA", "chance"
NONE = "nothing pruned"


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(apply, sites, groups, how, found, start, frozen, rate, seed):
    model = jl.lift(apply)
    solver = optax.adam(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / STEPS)))
    batch = lib.lib.BATCH

    def loss(one, base, kept, index, label, head):
        adapter = slicing.masked_adapter(jl.Adapter(one, frozen, sites), groups, kept)
        heads = jnp.broadcast_to(head, (batch, *head.shape))
        logits = model(base, adapter, found.hidden[index], found.mask[index], heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def scored(state, one, grads, key):
        adapter = jl.Adapter(one, frozen, sites)
        if how == OURS:
            return loraprune.observe(state, found.base, adapter, grads, groups)
        if how == CHANCE:  # drawn once: by the lane, not by the step
            keys = jax.random.split(key, len(groups))
            draw = {g.name: jax.random.uniform(k, (*g.stack, g.units))
                    for g, k in zip(groups, keys, strict=True)}  # fmt: skip
            return state._replace(scores=draw)
        params = found.base if how == WEIGHTS else jl.merge(found.base, adapter)
        return state._replace(scores=loram.magnitudes(params, groups))

    def lane(one, moments, state, task, number):
        own = jax.random.fold_in(jax.random.key(seed), task)
        key = jax.random.fold_in(own, number)
        pick = jax.random.randint(key, (batch,), 0, found.index.shape[1])
        base = slicing.masked(found.base, groups, state.kept)
        grads = jax.grad(loss)(one, base, state.kept, found.index[task][pick],
                               found.label[task][pick], found.heads[task])  # fmt: skip
        if how != NONE:
            state = scored(state, one, grads, jax.random.fold_in(own, STEPS))
            state = loraprune.pruned(state, loraprune.ratio(number + 1, STEPS, lib.HALF))
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, moments = solver.update(grads, moments, one)
        return optax.apply_updates(one, updates), moments, state

    count = found.heads.shape[0]
    each = lambda tree: jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), tree)  # noqa: E731
    tasks = jnp.arange(count, dtype=jnp.int32)

    def step(carry, number):
        return jax.vmap(lane, in_axes=(0, 0, 0, 0, None))(*carry, tasks, number), None

    with jax.numpy_dtype_promotion("standard"):
        carry = each(start), each(solver.init(start)), each(loraprune.start(groups))
    (one, _, state), _ = jax.lax.scan(step, carry, jnp.arange(STEPS, dtype=jnp.int32))
    return one, state.kept


def accuracy(how, rate, seed, rows, workdir):
    """Accuracy per task of the sliced models, [T]."""
    found, groups, small, _ = lib.bench(workdir)
    adapter = lib.fresh(found, seed)
    data = found._replace(apply=None, names=())
    one, kept = _train(found.apply, adapter.sites, groups, how, data, adapter.trainable,
                       adapter.frozen, jnp.float32(rate), jnp.int32(seed))  # fmt: skip
    if how == NONE:
        return lib.accuracy(found, adapter.replace(trainable=one), rows)
    out = []
    for task in range(len(found.names)):
        own = adapter.replace(trainable=jax.tree.map(lambda x, i=task: x[i], one))
        masks = {n: m[task] for n, m in kept.items()}
        less = slicing.sliced_adapter(own, groups, masks)
        lane = less.replace(trainable=jax.tree.map(lambda x: x[None], less.trainable))
        at = found._replace(apply=small, base=slicing.sliced(found.base, groups, masks),
                            heads=found.heads[task : task + 1])  # fmt: skip
        own_rows = tuple(x[task : task + 1] for x in getattr(found, rows))
        out.append(lib.lib.judge(at, lane, own_rows, np.asarray([0])).mean())
    return np.asarray(out)


@functools.cache
def best(how, workdir):
    """The rate of the best validation accuracy, on a seed of its own."""
    score = {r: accuracy(how, r, lib.lib.TUNING, "validation", workdir).mean() for r in RATES}
    return max(score, key=score.__getitem__)


def run(seed, workdir):
    """Test accuracy per task, one seed."""
    every, more = {}, {}
    for how in (OURS, WEIGHTS, CHANCE, MERGED, NONE):
        rate = best(WEIGHTS if how == MERGED else how, workdir)
        every[how] = accuracy(how, rate, seed, "test", workdir)
        more |= {f"{how}: accuracy": float(every[how].mean()), f"{how}: rate": rate}
    found, groups, *_ = lib.bench(workdir)
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (
        slicing.sliced(found.base, groups, loram.drawn(jax.random.key(0), groups, lib.HALF)),
        found.base)]  # fmt: skip
    more["numbers of the pruned layers over those of the full ones"] = sizes[0] / sizes[1]
    sides = (tuple(every[how].tolist()) for how in (OURS, WEIGHTS, CHANCE))
    return Figures(found.names, *sides, more=more)


CLAIM = Claim(
    name="loraprune",
    systems=("LoRAPrune",),
    statement=f"test accuracy after {STEPS} steps of LoRA in which the upper {lib.DEPTH} layers "
    "lose half of their heads and columns: by LoRA's gradients > by magnitude",
    reference="Zhang 2023, 2305.18403: better than magnitude at equal sparsity",
    baseline="units of the least Frobenius norm, same schedule and steps",
    control="units by chance, same schedule and steps",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)

"""Flexora: LoRA on the half of the layers that it selects, against LoRA on all, with few rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.schedules import flexora

DEPTH, HALF, RANK, ROWS = 4, 2, 4, 64
SEARCH, HELD = 40, 16  # steps of the search; rows that it validates on, out of ROWS
ALPHA_RATE, RATE = 0.05, 5e-3  # of the logits; of the factors, in the search
LAYERS = {path: tuple(range(DEPTH)) for path in lib.lib.SITES}
DRAWS = 3  # random halves per task and seed
ALL = lib.lora(RANK, layers=DEPTH, rows=ROWS)


def shown(adapter, state, step, key):
    """The deltas of the lane's own layers alone."""
    del step, key
    scales = {
        p: {**own, "scale": own["scale"] * state.astype(own["scale"].dtype)}
        for p, own in adapter.frozen.items()
    }
    return adapter.replace(frozen=scales)


def half(name, chosen):
    """The plan of LoRA on half of the layers; `chosen`: (seed, workdir) -> bool [T, L]."""
    return lib.on_attention(name, jl.LoRA(rank=RANK, alpha=float(RANK)), lanes=chosen, view=shown,
                            finish=shown, layers=DEPTH, rows=ROWS)  # fmt: skip


@functools.cache
def logits(unrolled, seed, workdir):
    """[T, L] logits of the layers after the search of each task."""
    found = lib.few(lib.tasks(workdir, DEPTH), ROWS)
    adapter = lib.fresh(ALL, seed, workdir)
    data = found._replace(apply=None, names=())
    return np.asarray(_search(found.apply, adapter.sites, unrolled, data, adapter.trainable,
                              adapter.frozen, jnp.int32(seed)))  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(apply, sites, unrolled, found, start, frozen, seed):
    model, rule = jl.lift(apply), optax.adam(RATE)

    def loss(adapter, task, rows):
        index, label = found.index[task][rows], found.label[task][rows]
        heads = jnp.broadcast_to(found.heads[task], (lib.lib.BATCH, *found.heads[task].shape))
        out = model(found.base, adapter, found.hidden[index], found.mask[index], heads)
        return optax.softmax_cross_entropy_with_integer_labels(out, label).mean()

    def lane(task):
        def step(carry, key):
            one, moments, state = carry
            first, second = jax.random.split(key)
            rows = jax.random.randint(first, (lib.lib.BATCH,), HELD, ROWS)
            held = jax.random.randint(second, (lib.lib.BATCH,), 0, HELD)
            adapter = jl.Adapter(one, frozen, sites)
            training = lambda a: loss(a, task, rows)  # noqa: E731
            validation = lambda a: loss(a, task, held)  # noqa: E731
            if unrolled:
                slope = flexora.unrolled(state.alpha, adapter, LAYERS, training, validation, RATE)
            else:
                slope = flexora.first_order(state.alpha, adapter, LAYERS, validation)
            state = flexora.advance(state, slope, ALPHA_RATE)

            def seen(t):
                return training(flexora.weighted(adapter.replace(trainable=t), state.alpha, LAYERS))

            with jax.numpy_dtype_promotion("standard"):  # adam: float to an integer power
                updates, moments = rule.update(jax.grad(seen)(one), moments)
            return (optax.apply_updates(one, updates), moments, state), None

        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), task), SEARCH)
        with jax.numpy_dtype_promotion("standard"):
            begin = start, rule.init(start), flexora.search(LAYERS)
        return jax.lax.scan(step, begin, keys)[0][2].alpha

    return jax.lax.map(lane, jnp.arange(found.index.shape[0], dtype=jnp.int32))


def selected(unrolled, seed, workdir):
    """bool [T, L]: the half of each task."""
    return jax.vmap(lambda a: flexora.select(a, HALF))(jnp.asarray(logits(unrolled, seed, workdir)))


def at_random(draw, seed, workdir):
    """bool [T, L]: a half of each task by chance."""
    count = len(lib.tasks(workdir, DEPTH).names)
    chance = np.random.default_rng([seed, draw]).random((count, DEPTH))
    return jnp.asarray(chance.argsort(1).argsort(1) < HALF)


UNROLLED = half("Flexora, unrolled gradient", functools.partial(selected, True))
FIRST = half("Flexora, first order", functools.partial(selected, False))
RANDOM = tuple(half(f"random half {k}", functools.partial(at_random, k)) for k in range(DRAWS))


def run(seed, workdir):
    """Test accuracy per task, one seed; halves at random at the rate of the first draw."""
    more = {}
    for plan in (UNROLLED, FIRST, ALL):
        more |= lib.about(plan, seed, workdir)
    for name, kind in (("unrolled", True), ("first order", False)):
        for layer, share in enumerate(np.asarray(selected(kind, seed, workdir)).mean(0)):
            more[f"{name}: share of tasks that train layer {layer}"] = float(share)
    sides = [lib.judge(plan, lib.trained(plan, seed, workdir), "test", workdir)
             for plan in (UNROLLED, ALL)]  # fmt: skip
    rate = lib.tune(RANDOM[0], workdir).rate
    chance = [lib.judge(p, lib.train(p, rate, seed, workdir), "test", workdir) for p in RANDOM]
    sides.append(np.mean(chance, axis=0))
    return Figures(lib.tasks(workdir).names, *(tuple(x.tolist()) for x in sides), more=more)


CLAIM = Claim(
    name="flexora",
    systems=("Flexora",),
    statement=f"test accuracy with {ROWS} training rows: LoRA on the {HALF} of {DEPTH} layers that "
    "Flexora selects > LoRA on all of them",
    reference="Wei 2024, 2408.10774: selecting layers is better than training all",
    baseline=f"LoRA of rank {RANK} on all {DEPTH} layers",
    control=f"LoRA on {HALF} layers by chance, mean of {DRAWS} draws",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)

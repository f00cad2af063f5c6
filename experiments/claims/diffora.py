"""DiffoRA: LoRA on the half of the modules that it chooses, against all at half the rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.schedules import diffora, flexora

DEPTH, RANK, ROWS = 4, 4, 64
SEARCH, HELD = 40, 16  # steps of the search; rows that it validates on, out of ROWS
GAMMA_RATE, RATE = 0.05, 5e-3  # of the logits; of the factors, in the search
COUNT = DEPTH * len(lib.lib.SITES)  # modules
HALF = COUNT // 2
PLACES = {path: tuple(range(i * DEPTH, (i + 1) * DEPTH)) for i, path in enumerate(lib.lib.SITES)}
DRAWS = 3  # random halves per task and seed
SEARCHED = lib.lora(RANK, layers=DEPTH, rows=ROWS)
UNIFORM = lib.lora(RANK // 2, layers=DEPTH, rows=ROWS)


def shown(adapter, state, step, key):
    """The deltas of the lane's own modules alone."""
    del step, key
    return diffora.weighted(adapter, state.astype(jnp.float32), PLACES)


def half(name, chosen):
    """The plan of LoRA on half of the modules; `chosen`: (seed, workdir) -> bool [T, n]."""
    return lib.on_attention(name, jl.LoRA(rank=RANK, alpha=float(RANK)), lanes=chosen, view=shown,
                            finish=shown, layers=DEPTH, rows=ROWS)  # fmt: skip


@functools.cache
def logits(relaxation, seed, workdir):
    """[T, n] logits of the modules after the search of each task."""
    found = lib.few(lib.tasks(workdir, DEPTH), ROWS)
    adapter = lib.fresh(SEARCHED, seed, workdir)
    data = found._replace(apply=None, names=())
    return np.asarray(_search(found.apply, adapter.sites, relaxation, data, adapter.trainable,
                              adapter.frozen, jnp.int32(seed)))  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(apply, sites, relaxation, found, start, frozen, seed):
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
            slope = diffora.slope(state.alpha, adapter, PLACES, lambda a: loss(a, task, held),
                                  relaxation=relaxation)  # fmt: skip
            state = flexora.advance(state, slope, GAMMA_RATE)
            weights = diffora.matrix(state.alpha, relaxation)

            def seen(t):
                moved = diffora.weighted(adapter.replace(trainable=t), weights, PLACES)
                return loss(moved, task, rows)

            with jax.numpy_dtype_promotion("standard"):  # adam: float to an integer power
                updates, moments = rule.update(jax.grad(seen)(one), moments)
            return (optax.apply_updates(one, updates), moments, state), None

        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), task), SEARCH)
        with jax.numpy_dtype_promotion("standard"):
            begin = start, rule.init(start), diffora.begin(PLACES)
        return jax.lax.scan(step, begin, keys)[0][2].alpha

    return jax.lax.map(lane, jnp.arange(found.index.shape[0], dtype=jnp.int32))


def selected(relaxation, seed, workdir):
    """bool [T, n]: the half of each task."""
    every = jnp.asarray(logits(relaxation, seed, workdir))
    return jax.vmap(lambda g: flexora.select(g, HALF))(every)


def at_random(draw, seed, workdir):
    """bool [T, n]: a half of each task by chance."""
    count = len(lib.tasks(workdir, DEPTH).names)
    chance = np.random.default_rng([seed, draw]).random((count, COUNT))
    return jnp.asarray(chance.argsort(1).argsort(1) < HALF)


SIGMOID = half("DiffoRA, sigmoid", functools.partial(selected, "sigmoid"))
SOFTMAX = half("DiffoRA, softmax", functools.partial(selected, "softmax"))
RANDOM = tuple(half(f"random half {k}", functools.partial(at_random, k)) for k in range(DRAWS))


def run(seed, workdir):
    """Test accuracy per task, one seed; halves at random at the rate of the first draw."""
    more = {}
    for plan in (SIGMOID, SOFTMAX, UNIFORM):
        more |= lib.about(plan, seed, workdir)
    for relaxation in ("sigmoid", "softmax"):
        share = np.asarray(selected(relaxation, seed, workdir)).mean(0).reshape(-1, DEPTH)
        for path, row in zip(lib.lib.SITES, share, strict=True):
            for layer, value in enumerate(row):
                name = f"{relaxation}: share of tasks that train {path.split('/')[-2]} {layer}"
                more[name] = float(value)
    sides = [lib.judge(plan, lib.trained(plan, seed, workdir), "test", workdir)
             for plan in (SIGMOID, UNIFORM)]  # fmt: skip
    rate = lib.tune(RANDOM[0], workdir).rate
    chance = [lib.judge(p, lib.train(p, rate, seed, workdir), "test", workdir) for p in RANDOM]
    sides.append(np.mean(chance, axis=0))
    names = lib.tasks(workdir, DEPTH).names
    return Figures(names, *(tuple(x.tolist()) for x in sides), more=more)


CLAIM = Claim(
    name="diffora",
    systems=("DiffoRA",),
    statement=f"test accuracy with {ROWS} training rows: LoRA of rank {RANK} on the {HALF} of "
    f"{COUNT} modules that DiffoRA keeps > rank {RANK // 2} on all, as many trained numbers",
    reference="Jiang 2025, 2502.08905: choosing modules is better than adapting all",
    baseline=f"LoRA of rank {RANK // 2} on all {COUNT} attention kernels of {DEPTH} layers",
    control=f"LoRA of rank {RANK} on {HALF} modules by chance, mean of {DRAWS} draws",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)

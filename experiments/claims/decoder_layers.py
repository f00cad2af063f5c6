r"""What the claims that choose layers share: base L continues kinds of text from few rows.

==========  ==============================================================================
t           one of the four kinds of text of the study of variants, which base L has not seen
n           training rows of `LENGTH` + 1 tokens; a third of them is held out of a search
m           which slices of the stacks are trained: the others have scale 0, so no gradient
==========  ==============================================================================

A search takes turns: a step of Adam on the logits, by their gradient on the rows held out, and one
on the factors, on the other rows. Then LoRA starts afresh on what was chosen, with all n rows, at
each rate of a grid; the rate is that of the lowest loss on validation rows of that kind and seed.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.variant_study import continuation
from experiments.variant_study.bench import Bench
from jlora.schedules import flexora

KERNELS = r"layers/(attention|ffn)/\w+/kernel"
ROWS, HELD, BATCH, STEPS, SEARCH = 48, 16, 8, 40, 30
RATES = (3e-3, 9e-3, 2.7e-2)
LOGIT_RATE, RATE = 0.05, 3e-3  # of the search: of its logits, and of its factors
ASSETS = ("stdlib_texts", "orange", "movie_reviews", "vader")
Places = Mapping[str, tuple[int, ...]]  # path -> the number of each slice
Slope = Callable[
    ..., jax.Array
]  # (logits, adapter, places, training, validation) -> their gradient


@functools.cache
def bench() -> Bench:
    """Base L, and the rows of each kind."""
    return continuation.base_l(Path(), None, toy=False)


@functools.cache
def rows(split: str) -> np.ndarray:
    """Tokens [kinds, rows, LENGTH + 1]; of the training rows `ROWS`, from all over the texts."""
    every = np.asarray(bench().data[split])
    if split != "train":
        return every
    return every[:, np.linspace(0, every.shape[1] - 1, ROWS).astype(int)]


def fresh(rank: int, seed: int) -> jl.Adapter:
    """LoRA on all kernels of base L before training."""
    one, ids = bench(), jnp.zeros((1, continuation.LENGTH), jnp.int32)
    methods = {KERNELS: jl.LoRA(rank, alpha=float(rank))}
    return jl.init(jax.random.key(seed), one.apply, one.base, ids, methods=methods)


def kept(adapter: jl.Adapter, chosen: Any, places: Places) -> jl.Adapter:
    """The adapter with scale 0 for slices that are not chosen.

    Args:
      adapter: LoRA.
      chosen: bool [n] by the number of a slice.
      places: those numbers.
    """
    frozen = {}
    for path, own in adapter.frozen.items():
        by = jnp.asarray(chosen)[jnp.asarray(places[path])].astype(own["scale"].dtype)
        frozen[path] = {**own, "scale": own["scale"] * by}
    return adapter.replace(frozen=frozen)


def _loss(apply: Any, base: Any, adapter: jl.Adapter, ids: jax.Array) -> jax.Array:
    logits = jl.lift(apply)(base, adapter, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(apply, sites, base, start, frozen, rates, train, key):
    def lane(rate):
        rule = optax.adam(lambda n: rate * (1 - n / STEPS))

        def step(carry, number):
            one, state = carry
            drawn = jax.random.fold_in(key, number)
            ids = train[jax.random.randint(drawn, (BATCH,), 0, train.shape[0])]
            grads = jax.grad(lambda t: _loss(apply, base, jl.Adapter(t, frozen, sites), ids))(one)
            with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
                updates, state = rule.update(grads, state, one)
            return (optax.apply_updates(one, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            begin = start, rule.init(start)
        return jax.lax.scan(step, begin, jnp.arange(STEPS, dtype=jnp.int32))[0][0]

    return jax.lax.map(lane, rates)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(apply, sites, base, lanes, frozen, ids):
    one = lambda t: _loss(apply, base, jl.Adapter(t, frozen, sites), ids)  # noqa: E731
    return jax.lax.map(one, lanes)


def tuned(adapter: jl.Adapter, kind: int, seed: int) -> tuple[float, float]:
    """(test loss of one kind at the best rate, that rate).

    Args:
      adapter: at its start.
      kind: number of the kind of text.
      seed: of the rows of each step.
    """
    one, ids = bench(), [jnp.asarray(rows(s)[kind]) for s in ("train", "validation", "test")]
    key = jax.random.fold_in(jax.random.key(seed), kind)
    fixed = one.apply, adapter.sites, one.base
    lanes = _fit(*fixed, adapter.trainable, adapter.frozen, jnp.asarray(RATES), ids[0], key)
    validation, test = (np.asarray(_judge(*fixed, lanes, adapter.frozen, x)) for x in ids[1:])
    best = int(np.nan_to_num(validation, nan=np.inf).argmin())
    return float(test[best]), RATES[best]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(apply, sites, slope, shown, base, start, frozen, places, logits, train, key):
    rule = optax.adam(RATE)

    def step(carry, number):
        one, moments, state = carry
        draws = jax.random.split(jax.random.fold_in(key, number))
        ids = train[jax.random.randint(draws[0], (BATCH,), HELD, train.shape[0])]
        held = train[jax.random.randint(draws[1], (BATCH,), 0, HELD)]
        adapter = jl.Adapter(one, frozen, sites)
        training, validation = (functools.partial(_loss, apply, base, ids=x) for x in (ids, held))
        state = flexora.advance(
            state, slope(state.alpha, adapter, places, training, validation), LOGIT_RATE
        )
        loss = lambda t: training(shown(adapter.replace(trainable=t), state.alpha, places))  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, moments = rule.update(jax.grad(loss)(one), moments)
        return (optax.apply_updates(one, updates), moments, state), None

    with jax.numpy_dtype_promotion("standard"):
        begin = start, rule.init(start), logits
    return jax.lax.scan(step, begin, jnp.arange(SEARCH, dtype=jnp.int32))[0][2].alpha


def search(
    adapter: jl.Adapter, places: Places, kind: int, seed: int, slope: Slope,
    shown: Callable[..., jl.Adapter],
) -> np.ndarray:  # fmt: skip
    """Logits of all slices after a search, [n].

    Args:
      adapter: at its start.
      places: numbers of its slices.
      kind: number of the kind of text.
      seed: of the rows.
      slope: the gradient of the logits, a function of a module, which is hashable.
      shown: (adapter, logits, places) -> the adapter in the training loss, one as well.
    """
    one = bench()
    key = jax.random.fold_in(jax.random.key(seed), 1000 + kind)
    at = {path: jnp.asarray(numbers, jnp.int32) for path, numbers in places.items()}
    logits = flexora.search(places, LOGIT_RATE)
    train = jnp.asarray(rows("train")[kind])
    return np.asarray(_search(one.apply, adapter.sites, slope, shown, one.base, adapter.trainable,
                              adapter.frozen, at, logits, train, key))  # fmt: skip


def at_random(size: int, count: int, draw: int, kind: int, seed: int) -> np.ndarray:
    """bool [size]: `count` slices by chance, another draw of each kind and seed."""
    chance = np.random.default_rng([seed, draw, kind]).random(size)
    return chance.argsort().argsort() < count

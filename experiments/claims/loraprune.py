r"""LoRAPrune on base L: units chosen by the gradients of LoRA, against magnitude and chance.

==========  ======================================================================================
u           units: 448 columns of the gated block, and 2 heads of the keys with the three query
            heads of each, in all of 6 layers; half of each are masked while LoRA is trained
t           one of the eight kinds of text of `decoder_domains`
x_st        held-out loss of kind t of the sliced model with its LoRA, units by `jlora.pruning.
            loraprune`
y_st        the same, units of the least Frobenius norm
z_st        control: the same, units by chance
==========  ======================================================================================

.. math:: x_{st} < y_{st}

Schedule, steps and rows are the same for all. Recorded too: magnitude of the merged kernels, and
LoRA of the whole model. Rates are chosen on validation rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import decoder_domains as domains
from experiments.claims import decoder_training as lib
from experiments.claims.protocol import Claim, Figures
from jlora.models.decoder import DecoderConfig
from jlora.pruning import loram, loraprune, slicing
from jlora.pruning.linked_axes import Linked, linked

HALF, RANK, STEPS = 0.5, 8, 100
RATES = (1e-3, 3e-3, 9e-3)
OURS, WEIGHTS, MERGED, CHANCE = "LoRA gradient", "magnitude", "magnitude with LoRA", "chance"
NONE = "nothing pruned"


def units() -> tuple[Linked, ...]:
    """Heads and columns of base L."""
    world, attention, block = domains.world(), "layers/attention", "layers/ffn"
    read = [f"{attention}/{name}/kernel" for name in ("query", "key", "value")]
    columns = [f"{block}/{name}/kernel" for name in ("gate", "up")]
    config, params = world.config, world.params
    return (linked("heads", params, config.kv_heads, read, [f"{attention}/out/kernel"]),
            linked("columns", params, config.ffn, columns, [f"{block}/down/kernel"]))  # fmt: skip


def small(config: DecoderConfig) -> DecoderConfig:
    """The architecture after slicing."""
    kept = config.kv_heads - int(HALF * config.kv_heads)
    return dataclasses.replace(config, kv_heads=kept, heads=config.heads // config.kv_heads * kept,
                               ffn=config.ffn - int(HALF * config.ffn))  # fmt: skip


@functools.cache
def _step(config: DecoderConfig, groups: tuple[Linked, ...], how: str):
    model, rule = jl.lift(domains.run_of(config)), optax.scale_by_adam()

    def observed(state, params, adapter, grads):
        if how == OURS:
            return loraprune.observe(state, params, adapter, grads, groups)
        if how == CHANCE:  # the scores of the start stay
            return state._replace(step=state.step + 1)
        params = params if how == WEIGHTS else jl.merge(params, adapter)
        return state._replace(scores=loram.magnitudes(params, groups), step=state.step + 1)

    def step(params, adapter, moments, state, ids, rate):
        base = slicing.masked(params, groups, state.kept)

        def loss(trainable):
            whole = adapter.replace(trainable=trainable)
            logits = model(base, slicing.masked_adapter(whole, groups, state.kept), ids[:, :-1])
            return domains.nats(logits, ids).mean()

        grads = jax.grad(loss)(adapter.trainable)
        if how != NONE:
            state = observed(state, params, adapter, grads)
            state = loraprune.pruned(state, loraprune.ratio(state.step, STEPS, HALF))
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, moments = rule.update(grads, moments)
        moved = jax.tree.map(lambda p, u: p - rate * u, adapter.trainable, updates)
        return adapter.replace(trainable=moved), moments, state

    return jax.jit(step)


@functools.cache
def trained(how: str, rate: float, seed: int) -> tuple[jl.Adapter, dict[str, jax.Array]]:
    """The adapter after training, and the masks of the units."""
    world, groups = domains.world(), units()
    adapter = lib.fresh(jl.LoRA(RANK, alpha=float(RANK)), seed)
    state, moments = loraprune.start(groups), optax.scale_by_adam().init(adapter.trainable)
    if how == CHANCE:
        draw = np.random.default_rng([seed, 37])
        state = state._replace(scores={n: jnp.asarray(draw.random(x.shape), jnp.float32)
                                       for n, x in state.scores.items()})  # fmt: skip
    step = _step(world.config, groups, how)
    for number in range(STEPS):
        now = jnp.float32(rate * (1 - number / STEPS))
        ids = lib.rows(seed, number)
        adapter, moments, state = step(world.params, adapter, moments, state, ids, now)
    return adapter, dict(state.kept)


def measured(how: str, rate: float, seed: int, at: domains.Rows) -> np.ndarray:
    """Loss of every token of the sliced model with its adapter merged, [rows, length]."""
    world, groups = domains.world(), units()
    adapter, kept = trained(how, rate, seed)
    if how == NONE:
        return domains.measured(adapter, at)[0]
    params = slicing.sliced(world.params, groups, kept)
    params = jl.merge(params, slicing.sliced_adapter(adapter, groups, kept))
    return np.asarray(_loss(small(world.config))(params, at.ids))


@functools.cache
def _loss(config: DecoderConfig):
    run = domains.run_of(config)
    return jax.jit(lambda params, ids: domains.nats(run(params, ids[:, :-1]), ids))


@functools.cache
def rate_of(how: str) -> float:
    """The rate of the lowest loss on validation rows."""
    few = domains.world().validation
    return lib.best(RATES, lambda r: measured(how, r, lib.TUNING, few).mean())


def run(seed: int, workdir: Any) -> Figures:
    """Held-out loss of each kind of text, one seed."""
    world, groups, loss, more = domains.world(), units(), {}, {}
    for how in (OURS, WEIGHTS, CHANCE, MERGED, NONE):
        rate = rate_of(WEIGHTS if how == MERGED else how)
        loss[how] = lib.by_kind(measured(how, rate, seed, world.test), world.test)
        more |= {f"{how}: loss": float(loss[how].mean()), f"{how}: rate": rate}
    base = domains.measured(None, world.test)[0]
    more["base L: loss"] = float(lib.by_kind(base, world.test).mean())
    sizes = [sum(x.size for x in jax.tree.leaves(p["layers"])) for p in (
        slicing.sliced(world.params, groups, loram.drawn(jax.random.key(0), groups, HALF)),
        world.params)]  # fmt: skip
    more["numbers of the pruned layers over those of the full ones"] = sizes[0] / sizes[1]
    sides = (tuple(loss[how].tolist()) for how in (OURS, WEIGHTS, CHANCE))
    return Figures(domains.NAMES, *sides, more=more)


CLAIM = Claim(
    name="loraprune",
    systems=("LoRAPrune",),
    statement=f"held-out loss of {len(domains.NAMES)} kinds of text after {STEPS} steps of LoRA in "
    "which base L loses half of its heads and columns: units by LoRA's gradients < by magnitude",
    reference="Zhang 2023, 2305.18403: a lower perplexity than magnitude at equal sparsity",
    baseline="units of the least Frobenius norm, same schedule and steps",
    control="units by chance, same schedule and steps",
    unit="loss",
    assets=domains.ASSETS,
    run=run,
    less_is_better=True,
)

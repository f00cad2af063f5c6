r"""LISA on a decoder: embeddings and one drawn layer at a time, to no higher a loss than LoRA.

==========  ======================================================================================
t           one of the eight kinds of text of `decoder_domains`, all of which base L is trained on
x_st        held-out loss of kind t after LISA: embeddings, head and norm in every step, 1 of the 6
            layers for 5 steps each, moments of that layer alone
y_st        the same after LoRA of rank 32 on all kernels, whose state is at least half as large
z_st        control: LISA on rows whose tokens are in random order
==========  ======================================================================================

.. math:: x_{st} < y_{st}

Base L's head is its embedding. Recorded too: the layers that have not moved by a bit after the
first interval, the norm of each layer's change under LISA, LoRA and training of all parameters (the
paper: LoRA's are skewed), and the sizes of all states. Rates are chosen by the training loss.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import decoder_domains as lib
from experiments.claims.protocol import Claim, Figures
from jlora.models.decoder import DecoderConfig
from jlora.optimizers.lisa import layer_norms, lisa

RANK, SLOTS, INTERVAL, LAYERS = 32, 1, 5, "^layers/"
STEPS, BATCH, LAST, TUNING = 60, 4, 10, 10_000
RATES = {"LISA": (3e-4, 1e-3, 3e-3), "LoRA": (1e-3, 3e-3, 9e-3), "all": (3e-4, 1e-3, 3e-3)}


def solver(name: str, rate: Any, seed: int = 0) -> optax.GradientTransformation:
    """LISA with the draws of a seed, or Adam."""
    if name == "LISA":
        return lisa(rate, LAYERS, slots=SLOTS, interval=INTERVAL, seed=seed)
    return optax.adam(rate)


def start(name: str, seed: int) -> tuple[Any, jl.Adapter | None]:
    """(what is trained, the adapter it belongs to): all parameters, or the arrays of LoRA."""
    found = lib.world()
    if name != "LoRA":
        return found.params, None
    adapter = lib.fresh(found.config, found.params, jl.LoRA(RANK, alpha=float(RANK)), seed)
    return adapter.trainable, adapter


@functools.cache
def _step(config: DecoderConfig, name: str, peak: float, seed: int):
    rule = solver(name, lambda n: peak * (1 - n / STEPS), seed)

    def step(params, values, adapter, state, ids):
        def loss(values):
            whole = (
                values if adapter is None else jl.merge(params, adapter.replace(trainable=values))
            )
            return lib.nats(lib.run_of(config)(whole, ids[:, :-1]), ids).mean()

        value, grads = jax.value_and_grad(loss)(values)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(grads, state, values)
        return optax.apply_updates(values, updates), state, value

    return rule, jax.jit(step)


def batch(seed: int, number: int, scrambled: bool) -> np.ndarray:
    """Rows of a step, each of a kind drawn by chance, [BATCH, length + 1].

    Args:
      seed: of the run.
      number: of the step.
      scrambled: whether the tokens of a row are put in random order.
    """
    train, size = lib.world().train, lib.SEGMENT * lib.SEGMENTS + 1
    draw, rows = np.random.default_rng([seed, 23, number]), []
    for kind in draw.integers(0, len(train), BATCH):
        begin = draw.integers(0, len(train[kind]) - size + 1)
        rows.append(train[kind][begin : begin + size])
    ids = np.stack(rows)
    return draw.permuted(ids, axis=1) if scrambled else ids


@functools.cache
def trained(
    name: str, rate: float, seed: int, scrambled: bool = False, steps: int | None = None
) -> tuple[Any, float]:
    """The parameters after training, and the mean loss of the last steps.

    Args:
      name: key of `RATES`.
      rate: peak learning rate.
      seed: of rows, draws of layers and the start of LoRA.
      scrambled: of `batch`.
      steps: how many of the run; None: all.
    """
    found = lib.world()
    values, adapter = start(name, seed)
    rule, step = _step(found.config, name, rate, seed)
    with jax.numpy_dtype_promotion("standard"):
        state = rule.init(values)
    losses = []
    for number in range(STEPS if steps is None else steps):
        ids = batch(seed, number, scrambled)
        values, state, value = step(found.params, values, adapter, state, ids)
        losses.append(float(value))
    whole = values if adapter is None else jl.merge(found.params, adapter.replace(trainable=values))
    return whole, float(np.mean(losses[-LAST:]))


@functools.cache
def best(name: str) -> float:
    """The rate of the lowest training loss."""
    score = {rate: trained(name, rate, TUNING)[1] for rate in RATES[name]}
    return min(score, key=lambda rate: float(np.nan_to_num(score[rate], nan=np.inf)))


@functools.cache
def _measure(config: DecoderConfig):
    return jax.jit(lambda params, ids: lib.nats(lib.run_of(config)(params, ids[:, :-1]), ids))


def measured(params: Any) -> np.ndarray:
    """Held-out loss of each kind of text, [D]."""
    found = lib.world()
    loss = np.asarray(_measure(found.config)(params, found.test.ids))
    return np.asarray([loss[found.test.kind[:, 1:] == d].mean() for d in range(len(lib.NAMES))])


def still(before: Any, after: Any) -> int:
    """How many layers are bitwise what they were."""
    same = [
        np.asarray(x == y).reshape(len(x), -1).all(1)
        for x, y in zip(*(jax.tree.leaves(p["layers"]) for p in (before, after)), strict=True)
    ]
    return int(np.all(same, axis=0).sum())


def state_size(name: str) -> int:
    """Numbers in an optimizer's state."""
    values = start(name, 0)[0]
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(solver(name, 1e-3).init, values)
    return sum(int(np.prod(t.shape)) for t in jax.tree.leaves(shapes))


def run(seed: int, workdir: Any) -> Figures:
    """Held-out loss of each kind of text, one seed."""
    found = lib.world()
    made = {name: trained(name, best(name), seed)[0] for name in RATES}
    loss = {name: measured(params) for name, params in made.items()}
    control = measured(trained("LISA", best("LISA"), seed, scrambled=True)[0])
    more = {f"{name}: rate": best(name) for name in RATES}
    more |= {f"{name}: loss": float(x.mean()) for name, x in loss.items()}
    more["base L: loss"] = float(measured(found.params).mean())
    more |= {f"state of {name} over that of LoRA": state_size(name) / state_size("LoRA")
             for name in ("LISA", "all")}  # fmt: skip
    first, _ = trained("LISA", best("LISA"), seed, steps=INTERVAL)
    more["layers that stay bitwise in the first interval"] = still(found.params, first)
    for name, params in made.items():
        norms = np.asarray(layer_norms(jax.tree.map(jnp.subtract, params, found.params), LAYERS))
        more |= {f"{name}: norm of the change of layer {k}": float(v) for k, v in enumerate(norms)}
    sides = (tuple(x.tolist()) for x in (loss["LISA"], loss["LoRA"], control))
    return Figures(lib.NAMES, *sides, more=more)


CLAIM = Claim(
    name="lisa_decoder",
    systems=("LISA",),
    statement=f"held-out loss of {len(lib.NAMES)} kinds of text after {STEPS} steps of base L on "
    f"all of them: LISA, embeddings and {SLOTS} of 6 layers for {INTERVAL} steps each < LoRA of "
    f"rank {RANK}, whose state is at least half as large",
    reference="Pan 2024, 2403.17919: a loss as low as LoRA's or lower in as little memory",
    baseline=f"LoRA of rank {RANK} on all kernels of all layers",
    control="LISA on rows whose tokens are in random order",
    unit="loss",
    assets=lib.ASSETS,
    run=run,
    less_is_better=True,
)

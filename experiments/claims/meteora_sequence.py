r"""MeteoRA: gates that change adapters inside of a sequence that turns from task to task.

==========  ======================================================================================
i           test row of four pieces of text of four kinds, of the eight kinds of `decoder_domains`
x_si        loss of row i with gates over the eight adapters, frozen, which are not given the kinds
y_si        the same with the one adapter that is best on validation rows
z_si        control: the trained gates, each of which picks the adapter next to the one it meant
==========  ======================================================================================

.. math:: x_{si} < y_{si}

Gates learn from the cross entropy of rows of four pieces and from `label_loss`, which is given the
kind of each token in training. Recorded too: what each token's own adapter has on the same rows
(the paper: 0.97 of its score), the share of the gain over base L that is kept, near to a turn and
far from it, and the static mean of all adapters.
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
from jlora.methods import MeteoRA
from jlora.methods.routed.expert_bank import with_experts
from jlora.models.decoder import DecoderConfig

TOP, STEPS, BATCH, RATE, LABELS = 2, 60, 4, 5e-3, 1.0  # of the gates
NEAR = 4  # tokens after a turn


@functools.cache
def _step(config: DecoderConfig):
    model = jl.lift(lib.run_of(config), aux=True)

    def step(params, adapter, state, ids, kind, rate):
        def loss(trainable):
            gated = adapter.replace(trainable=trainable)
            logits, aux = model(params, gated, ids[:, :-1], ctx={"labels": kind})
            gates = sum(jnp.mean(report["label_loss"]) for report in aux.values()) / len(aux)
            return lib.nats(logits, ids).mean() + LABELS * gates

        grads = jax.grad(loss)(adapter.trainable)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        moved = jax.tree.map(lambda p, u: p - rate * u, adapter.trainable, updates)
        return adapter.replace(trainable=moved), state

    return jax.jit(step)


def gated(adapters: list[jl.Adapter], seed: int) -> jl.Adapter:
    """Gates over frozen adapters, trained on composed rows of the training text."""
    found = lib.world()
    method = MeteoRA(len(adapters), TOP, lib.RANK)
    adapter = with_experts(lib.fresh(found.config, found.params, method, seed), adapters)
    state, step = optax.scale_by_adam().init(adapter.trainable), _step(found.config)
    for number in range(STEPS):
        draw = np.random.default_rng([seed, 17, number])
        rows = lib.composed(list(found.train), BATCH, draw)
        now = RATE * (1 - number / STEPS)
        adapter, state = step(found.params, adapter, state, rows.ids, rows.kind[:, :-1], now)
    return adapter


def turned(adapter: jl.Adapter) -> jl.Adapter:
    """The control: what spoke for one adapter speaks for the next."""
    moved = {path: {k: jnp.roll(x, 1, axis=-1) if k == "gate" else x for k, x in arrays.items()}
             for path, arrays in adapter.trainable.items()}  # fmt: skip
    return adapter.replace(trainable=moved)


@functools.cache
def _measure(config: DecoderConfig):
    model = jl.lift(lib.run_of(config))

    def measure(params, adapter, ids):
        logits = model(params, adapter, ids[:, :-1])
        return lib.nats(logits, ids), logits.argmax(-1).astype(jnp.int32) == ids[:, 1:]

    return jax.jit(measure)


def measured(adapter: jl.Adapter, rows: lib.Rows) -> tuple[np.ndarray, np.ndarray]:
    """Of gates: loss of each token, and whether it was the most likely one, [rows, length]."""
    found = lib.world()
    loss, right = _measure(found.config)(found.params, adapter, rows.ids)
    return np.asarray(loss), np.asarray(right)


def picked(each: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Of values [D, rows, length] those of the kind that was read last, [rows, length]."""
    return np.take_along_axis(each, kind[None], axis=0)[0]


def gains(ours: np.ndarray, own: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Shares of the own adapters' gain over the base: near to the start of a segment, and far."""
    place = np.arange(ours.shape[1]) % lib.SEGMENT
    near = (place < NEAR) & (np.arange(ours.shape[1]) >= lib.SEGMENT)
    out = {}
    for name, at in (("all tokens", slice(None)), (f"{NEAR} tokens after a turn", near),
                     ("later tokens", place >= NEAR)):  # fmt: skip
        mean: Any = [x[:, at].mean() for x in (base, ours, own)]
        out[f"share of the own adapters' gain, {name}"] = float(
            (mean[0] - mean[1]) / (mean[0] - mean[2])
        )
    return out


def averaged(adapters: list[jl.Adapter]) -> jl.Adapter:
    """The mean of all adapters' deltas, as one adapter."""
    weights = jnp.full(len(adapters), 1.0 / len(adapters), jnp.float32)
    return jl.merging.merge("concat", adapters, weights)


def run(seed: int, workdir: Any) -> Figures:
    """Loss of each test row, one seed."""
    rows, few = lib.world().test, lib.world().validation
    adapters = [lib.own(d, seed) for d in range(len(lib.NAMES))]
    best = int(np.argmin([lib.measured(a, few)[0].mean() for a in adapters]))
    gates = gated(adapters, seed)
    (ours, right), (control, _) = (measured(g, rows) for g in (gates, turned(gates)))
    each = [lib.measured(a, rows) for a in adapters]
    own, hit = (picked(np.stack(x), rows.kind[:, :-1]) for x in zip(*each, strict=True))
    base, single = lib.measured(None, rows)[0], each[best][0]
    values = {"base L": base, "MeteoRA": ours, "own adapters": own, "mean of all adapters":
              lib.measured(averaged(adapters), rows)[0], "gates turned": control}  # fmt: skip
    more = {f"{name}: perplexity": float(np.exp(x.mean())) for name, x in values.items()}
    more |= {f"{n}: perplexity": float(np.exp(x.mean()))
             for n, (x, _) in zip(lib.NAMES, each, strict=True)}  # fmt: skip
    more |= gains(ours, own, base) | {f"best single: {lib.NAMES[best]}": float(single.mean())}
    more["accuracy of tokens over that of own adapters"] = float(right.mean() / hit.mean())
    names = tuple(f"row {n}" for n in range(len(ours)))
    sides = (tuple(x.mean(1).tolist()) for x in (ours, single, control))
    return Figures(names, *sides, more=more)


CLAIM = Claim(
    name="meteora_sequence",
    systems=("MeteoRA",),
    statement=f"held-out loss of rows of {lib.SEGMENTS} kinds of text, of {len(lib.NAMES)}: gates "
    f"over the adapter of each kind, {TOP} per token < the best single adapter",
    reference="Xu 2024, 2405.13053: several tasks solved in one sequence by changing adapters",
    baseline="the single adapter that is best on validation rows",
    control="the trained gates, each shifted to the next adapter",
    unit="loss",
    assets=lib.ASSETS,
    run=run,
    less_is_better=True,
)

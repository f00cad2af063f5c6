"""Early exits of a recursive decoder: trained outputs of the first run save runs of the block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import relaxed_recursive as base
from experiments.claims.protocol import Claim, Figures
from jlora.models.decoder import DecoderConfig
from jlora.models.decoder.loops import exits
from jlora.pruning import early_exit
from jlora.pruning.recursive import by_depth

NAMES = ("aggressive", "last", "targets of another row")
RATES = (3e-4, 1e-3, 3e-3)  # of Adam; chosen per model by the training loss of the last run
ROWS = 8  # of a batch whose runs are counted
THRESHOLDS = (0.5, 0.8)  # of exits by confidence


def start() -> tuple[Any, Any]:
    """Shared parameters of base L, and the bank of factors by depth."""
    shared, adapter = base.start_of("relaxed")
    return shared, by_depth(adapter, base.BLOCKS)


def losses(
    shared: Any, bank: Any, ids: Any, config: DecoderConfig, first: Any = None
) -> tuple[Any, Any]:
    """Cross-entropy after every run [J, rows, t], and the logits.

    Args:
      shared: kernels of the block.
      bank: factors by depth.
      ids: rows of context + 1 tokens.
      config: the architecture.
      first: rows whose tokens all runs but the last have to predict; None: the same.
    """
    logits = exits(shared, bank, ids[:, :-1], config=config)
    wanted = jnp.stack([ids if first is None else first] * (len(logits) - 1) + [ids])[:, :, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted), logits


@functools.cache
def _step(config: DecoderConfig, weighting: early_exit.Weighting, elsewhere: bool):
    def step(shared, bank, state, ids, rate):
        def loss(values):
            first = jnp.roll(ids, 1, axis=0) if elsewhere else None
            kept, trainable = values
            each, _ = losses(kept, bank.replace(trainable=trainable), ids, config, first)
            mean = each.mean((1, 2))
            return early_exit.exit_loss(mean, weighting), mean[-1]

        values = shared, bank.trainable
        grads, last = jax.grad(loss, has_aux=True)(values)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        shared, trainable = jax.tree.map(lambda p, u: p - rate * u, values, updates)
        return shared, bank.replace(trainable=trainable), state, last

    return jax.jit(step)


@functools.cache
def trained(name: str, rate: float, seed: int) -> tuple[Any, Any, np.ndarray]:
    """Kernels and factors after uptraining, and the loss of the last run at each step."""
    found = base.world()
    shared, bank = start()
    state = optax.scale_by_adam().init((shared, bank.trainable))
    weighting: Any = "last" if name == "last" else "aggressive"
    step, seen, size = _step(found.config, weighting, name == NAMES[2]), [], found.rows.shape[1]
    for number in range(base.STEPS):
        draw = np.random.default_rng([seed, number])
        starts = draw.integers(0, len(found.train) - size + 1, base.BATCH)
        ids = found.train[starts[:, None] + np.arange(size)[None]]
        now = rate * (1 - number / base.STEPS)
        shared, bank, state, value = step(shared, bank, state, ids, now)
        seen.append(float(value))
    return shared, bank, np.asarray(seen)


@functools.cache
def best(name: str) -> float:
    """The rate of the lowest training loss of the last run."""
    scores = {rate: trained(name, rate, base.TUNING)[2][-base.LAST :].mean() for rate in RATES}
    return min(scores, key=lambda rate: float(np.nan_to_num(scores[rate], nan=np.inf)))


@functools.cache
def _measure(config: DecoderConfig):
    def measure(shared, bank, ids):
        each, logits = losses(shared, bank, ids, config)
        sure = [early_exit.confident_exits(logits, t)[0] for t in THRESHOLDS]
        return each.mean((1, 2)), early_exit.oracle_exits(logits)[0], jnp.stack(sure)

    return jax.jit(measure)


def measured(shared: Any, bank: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Runs per token of the oracle for each document, and other figures of one model."""
    found = base.world()
    measure = _measure(found.config)
    rows = [jax.tree.map(np.asarray, measure(shared, bank, row[None])) for row in found.rows]
    loss, oracle, sure = (np.stack(x) for x in zip(*rows, strict=True))
    loops = loss.shape[1]
    more = {f"perplexity after run {j + 1}": float(np.exp(loss[:, j].mean())) for j in range(loops)}
    ways = {"oracle": oracle}
    ways |= {f"confidence {t}": sure[:, k] for k, t in enumerate(THRESHOLDS)}
    for name, e in ways.items():
        runs = early_exit.block_runs(e.tolist(), ROWS, loops)
        more[f"{name}: runs per token"] = float(1 + e.mean())
        more[f"{name}: runs of a full batch over runs that wait"] = runs.full / runs.waiting
        more[f"{name}: runs of a full batch over depth-wise ones"] = runs.full / runs.depth_wise
    per = [1 + oracle[found.owner == n].mean() for n in range(len(found.units))]
    return np.asarray(per), more


def run(seed: int, workdir: Any) -> Figures:
    """Runs per token, one seed."""
    runs, more = {}, {}
    for name in NAMES:
        rate = best("aggressive" if name == NAMES[2] else name)
        runs[name], own = measured(*trained(name, rate, seed)[:2])
        more |= {f"{name}: {k}": v for k, v in own.items()} | {f"{name}: rate": rate}
    return Figures(base.world().units, *(tuple(runs[name].tolist()) for name in NAMES), more=more)


CLAIM = Claim(
    name="recursive_exit",
    systems=("Continuous Depth-wise Batching",),
    statement="runs of the block per held-out token, where a token leaves once it has the answer "
    f"of the last run: base L as 2 loops of {base.BLOCKS} layers, {base.STEPS} steps with the "
    "aggressive weights of the losses of all runs < with the loss of the last run alone",
    reference="Bae 2024, 2410.20672: early exits trained over loops, batched by depth",
    baseline="the same model trained by the loss of its last run alone, left in the same way",
    control="all runs but the last learn to predict the tokens of another row",
    unit="runs per token",
    assets=("stdlib_texts",),
    run=run,
    less_is_better=True,
)

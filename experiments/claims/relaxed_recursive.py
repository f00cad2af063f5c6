"""Relaxed Recursive Transformers: tied layers with LoRA per depth predict better than tied ones."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.pretraining import base_l, texts, tokens
from jlora.models import decoder
from jlora.pruning.recursive import STARTS, looped, relaxed, tied

BLOCKS, RANK, STEPS, BATCH = 3, 8, 60, 4  # 2 loops of 3 layers; uptraining of all that is stored
RATES = (3e-4, 1e-3, 3e-3)  # of Adam; chosen per model by the training loss
TUNING, LAST = 10_000, 10  # seed of the choice; steps whose loss is compared
ROWS = 4  # measured of each held-out document, at most
SOURCES = ("moby_dick", "sotu")
KERNELS = r"layers/(attention|ffn)/\w+/kernel"


class World(NamedTuple):
    """Base L and rows of its context."""

    config: decoder.DecoderConfig
    params: Any
    train: np.ndarray  # tokens of the training documents
    units: tuple[str, ...]  # held-out documents
    rows: np.ndarray  # int32 [rows, context + 1]
    owner: np.ndarray  # int64 [rows]: the document of a row


@functools.cache
def world() -> World:
    """Documents of sources that base L was trained on."""
    base = base_l.load()
    size = base.config.max_positions + 1
    documents = texts.documents(SOURCES)
    units, rows, owner = [], [], []
    for document in (d for d in documents if d.held_out):
        ids = tokens.stream(base.tokenizer, [document], True).astype(np.int32)
        starts = range(0, len(ids) - size + 1, size)[:ROWS]
        if starts:
            rows += [ids[start : start + size] for start in starts]
            owner += [len(units)] * len(starts)
            units.append(f"{document.source}/{document.name}")
    train = tokens.stream(base.tokenizer, documents, False).astype(np.int32)
    return World(base.config, base.params, train, tuple(units), np.stack(rows), np.asarray(owner))


def start_of(name: str, start: str = "average") -> tuple[Any, Any]:
    """What is trained: (shared parameters, adapter); the adapter of "tied" is None.

    Args:
      name: "relaxed", "tied", or "factors of another depth".
      start: of the shared kernels.
    """
    found = world()
    kind: Any = start
    shared = tied(found.params, BLOCKS, kind)
    if name == "tied":
        return shared, None
    run = functools.partial(decoder.forward, config=found.config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    whole = looped(shared, found.config.layers)
    methods = {KERNELS: jl.LoRA(RANK, alpha=float(RANK))}
    adapter = relaxed(
        jl.init(jax.random.key(0), run, whole, ids, methods=methods), found.params, shared
    )
    if name == "factors of another depth":  # of the next loop, so of the same block
        moved = jax.tree.map(lambda x: jnp.roll(x, BLOCKS, axis=0), adapter.trainable)
        adapter = adapter.replace(trainable=moved)
    return shared, adapter


def whole_of(shared: Any, adapter: Any, depth: int) -> Any:
    """Parameters of all layers."""
    params = looped(shared, depth)
    return params if adapter is None else jl.merge(params, adapter)


def nats(params: Any, ids: Any, config: decoder.DecoderConfig) -> Any:
    """Cross-entropy of all tokens but the first, [rows, context]."""
    logits = decoder.forward(params, ids[:, :-1], config=config).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])


@functools.cache
def _step(config: decoder.DecoderConfig):
    def step(shared, adapter, state, ids, rate):
        def loss(values):
            kept, trainable = values
            own = None if adapter is None else adapter.replace(trainable=trainable)
            return nats(whole_of(kept, own, config.layers), ids, config).mean()

        values = shared, None if adapter is None else adapter.trainable
        value, grads = jax.value_and_grad(loss)(values)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        shared, trainable = jax.tree.map(lambda p, u: p - rate * u, values, updates)
        adapter = None if adapter is None else adapter.replace(trainable=trainable)
        return shared, adapter, state, value

    return jax.jit(step)


@functools.cache
def trained(name: str, rate: float, seed: int) -> tuple[Any, np.ndarray]:
    """The parameters of all layers after uptraining, and the loss of each step."""
    found = world()
    shared, adapter = start_of(name)
    values: Any = shared, None if adapter is None else adapter.trainable
    state = optax.scale_by_adam().init(values)
    step, losses, size = _step(found.config), [], found.rows.shape[1]
    for number in range(STEPS):
        draw = np.random.default_rng([seed, number])
        starts = draw.integers(0, len(found.train) - size + 1, BATCH)
        ids = found.train[starts[:, None] + np.arange(size)[None]]
        now = rate * (1 - number / STEPS)
        shared, adapter, state, value = step(shared, adapter, state, ids, now)
        losses.append(float(value))
    return whole_of(shared, adapter, found.config.layers), np.asarray(losses)


@functools.cache
def best(name: str) -> float:
    """The rate of the lowest training loss."""
    scores = {rate: trained(name, rate, TUNING)[1][-LAST:].mean() for rate in RATES}
    return min(scores, key=lambda rate: float(np.nan_to_num(scores[rate], nan=np.inf)))


@functools.cache
def _measure(config: decoder.DecoderConfig):
    return jax.jit(lambda params, ids: nats(params, ids, config).mean(-1))


def measured(params: Any) -> np.ndarray:
    """Loss of each held-out document, nats per token."""
    found = world()
    measure = _measure(found.config)
    loss = np.concatenate([np.asarray(measure(params, row[None])) for row in found.rows])
    return np.asarray([loss[found.owner == n].mean() for n in range(len(found.units))])


@functools.cache
def before_training() -> dict[str, float]:
    """Perplexities of the original and of every start, the same for all seeds."""
    found = world()
    more = {"original: perplexity": float(np.exp(measured(found.params).mean()))}
    for start in STARTS:
        for name in ("tied", "relaxed"):
            value = measured(whole_of(*start_of(name, start), found.config.layers)).mean()
            more[f"{name}, {start}, before training: perplexity"] = float(np.exp(value))
    return more


def size(tree: Any) -> int:
    """Numbers in a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def run(seed: int, workdir: Any) -> Figures:
    """Loss per held-out document, one seed."""
    found = world()
    rates = {"relaxed": best("relaxed"), "tied": best("tied")}
    rates["factors of another depth"] = rates["relaxed"]
    loss = {name: measured(trained(name, rate, seed)[0]) for name, rate in rates.items()}
    more = {f"{name}: perplexity": float(np.exp(x.mean())) for name, x in loss.items()}
    more |= {f"{name}: rate": rate for name, rate in rates.items()}
    more |= before_training()
    shared, adapter = start_of("relaxed")
    more |= {"numbers of the original": float(size(found.params)), "tied": float(size(shared)),
             "relaxed": float(size(shared) + size(adapter.trainable))}  # fmt: skip
    return Figures(found.units, *(tuple(loss[name].tolist()) for name in rates), more=more)


CLAIM = Claim(
    name="relaxed_recursive",
    systems=("Relaxed Recursive Transformers",),
    statement=f"held-out loss of base L as 2 loops of {BLOCKS} layers after {STEPS} steps: with "
    f"LoRA of rank {RANK} per depth < tied layers alone",
    reference="Bae 2024, 2410.20672: relaxed recursive models are better than recursive ones",
    baseline="the same tied layers, average start, without LoRA",
    control="the factors of each layer are those of the next loop's layer of the same block",
    unit="loss",
    assets=("stdlib_texts",),
    run=run,
    less_is_better=True,
)

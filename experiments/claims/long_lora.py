"""LongLoRA: trained with shifted groups, served with full attention, as good as full training."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.pretraining import base_l, texts, tokens
from jlora.models import decoder

FACTOR, GROUPS = 4, 4  # context over that of base L; groups of a row
STEPS, BATCH, RANK, ALPHA = 40, 1, 8, 16.0
RATES = (3e-4, 1e-3, 3e-3)  # of Adam; chosen per kind of adapter by the training loss
TUNING, LAST = 10_000, 10  # seed of the choice; steps whose loss is compared
ROWS = 2  # measured of each held-out document, at most
SOURCES = ("moby_dick", "sotu")
LORA = r"layers/attention/(query|key|value|out)/kernel"


class World(NamedTuple):
    """Base L with positions for the long context, and rows of long documents."""

    config: decoder.DecoderConfig
    params: Any
    train: tuple[np.ndarray, ...]  # tokens of each training document
    units: tuple[str, ...]  # held-out documents
    rows: np.ndarray  # int32 [rows, context + 1] of held-out documents
    owner: np.ndarray  # int64 [rows]: the document of a row


class Kind(NamedTuple):
    """One way to train."""

    attend: decoder.Attend  # in training; the result is measured with full attention
    whole: bool  # norms and embeddings are trained too


@functools.cache
def world() -> World:
    """Documents that are longer than a row, of sources that base L was trained on."""
    base = base_l.load()
    config = decoder.interpolated(base.config, FACTOR)
    size = config.max_positions + 1
    long: dict[bool, list[tuple[str, np.ndarray]]] = {False: [], True: []}
    for document in texts.documents(SOURCES):
        ids = tokens.stream(base.tokenizer, [document], document.held_out).astype(np.int32)
        if len(ids) >= size:
            long[document.held_out].append((f"{document.source}/{document.name}", ids))
    rows, owner = [], []
    for number, (_, ids) in enumerate(long[True]):
        starts = range(0, len(ids) - size + 1, size)[:ROWS]
        rows += [ids[start : start + size] for start in starts]
        owner += [number] * len(starts)
    train = tuple(ids for _, ids in long[False])
    return World(config, base.params, train, tuple(n for n, _ in long[True]), np.stack(rows),
                 np.asarray(owner))  # fmt: skip


def kinds(context: int) -> dict[str, Kind]:
    """What is compared, by name."""
    groups = decoder.ShiftedAttention(context // GROUPS)
    still = decoder.ShiftedAttention(context // GROUPS, shift=False)
    return {
        "LongLoRA": Kind(groups, True),
        "full attention": Kind(decoder.attend, True),
        "groups that are not moved": Kind(still, True),
        "LoRA alone": Kind(groups, False),
    }


def fresh(found: World, whole: bool, seed: int) -> Any:
    """An adapter: LoRA on attention and, if `whole`, all norms and embeddings as they are."""
    methods: dict[str, Any] = {LORA: jl.LoRA(RANK, alpha=ALPHA)}
    if whole:
        every = tuple(range(found.config.vocab))
        methods |= {r"(.*/)?\w*norm/scale": jl.LNTuning(),
                    "embed_tokens/embedding": jl.TrainableTokens(every)}  # fmt: skip
    run = functools.partial(decoder.forward, config=found.config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jl.init(jax.random.key(seed), run, found.params, ids, methods=methods)


def nats(params: Any, ids: Any, config: decoder.DecoderConfig, attend: decoder.Attend) -> Any:
    """Cross-entropy of all tokens but the first, [rows, context]."""
    logits = decoder.forward(params, ids[:, :-1], config=config, attend=attend).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])


@functools.cache
def _step(config: decoder.DecoderConfig, attend: decoder.Attend):
    def step(params, adapter, state, ids, rate):
        def loss(trainable):
            merged = jl.merge(params, adapter.replace(trainable=trainable))
            return nats(merged, ids, config, attend).mean()

        value, grads = jax.value_and_grad(loss)(adapter.trainable)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        moved = jax.tree.map(lambda p, u: p - rate * u, adapter.trainable, updates)
        return adapter.replace(trainable=moved), state, value

    return jax.jit(step)


def drawn(documents: Sequence[np.ndarray], size: int, seed: int, step: int) -> np.ndarray:
    """Rows of a step, each inside one document, [BATCH, size]."""
    draw = np.random.default_rng([seed, step])
    weight = np.asarray([len(d) - size + 1 for d in documents], np.float64)
    rows = []
    for number in draw.choice(len(documents), BATCH, p=weight / weight.sum()):
        start = draw.integers(0, int(weight[number]))
        rows.append(documents[number][start : start + size])
    return np.stack(rows)


@functools.cache
def trained(name: str, rate: float, seed: int) -> tuple[Any, np.ndarray]:
    """The adapted parameters and the loss of each step."""
    found = world()
    kind = kinds(found.config.max_positions)[name]
    adapter = fresh(found, kind.whole, seed)
    state = optax.scale_by_adam().init(adapter.trainable)
    step, losses = _step(found.config, kind.attend), []
    for number in range(STEPS):
        ids = drawn(found.train, found.rows.shape[1], seed, number)
        now = rate * (1 - number / STEPS)
        adapter, state, value = step(found.params, adapter, state, ids, now)
        losses.append(float(value))
    return jl.merge(found.params, adapter), np.asarray(losses)


@functools.cache
def best(name: str) -> float:
    """The rate of the lowest training loss."""
    scores = {rate: trained(name, rate, TUNING)[1][-LAST:].mean() for rate in RATES}
    return min(scores, key=lambda rate: float(np.nan_to_num(scores[rate], nan=np.inf)))


@functools.cache
def _measure(config: decoder.DecoderConfig):
    return jax.jit(lambda params, ids: nats(params, ids, config, decoder.attend).mean(-1))


def measured(params: Any, config: decoder.DecoderConfig) -> np.ndarray:
    """Loss of each held-out document with full attention, nats per token."""
    found = world()
    loss = np.concatenate([np.asarray(_measure(config)(params, row[None])) for row in found.rows])
    return np.asarray([loss[found.owner == n].mean() for n in range(len(found.units))])


def flops(attend: decoder.Attend, tokens: int, config: decoder.DecoderConfig) -> float:
    """Arithmetic of one layer's attention on one row, by XLA's count."""
    part = [jax.ShapeDtypeStruct((1, tokens, n, config.head_width), jnp.float32)
            for n in (config.heads, config.kv_heads, config.kv_heads)]  # fmt: skip
    seen = jax.ShapeDtypeStruct((1, tokens, tokens), jnp.bool_)
    run = jax.jit(functools.partial(attend, scale=1.0, cap=0.0))
    cost: Any = run.lower(*part, seen).compile().cost_analysis()
    return float(cost["flops"])


@functools.cache
def of_the_base() -> dict[str, float]:
    """Perplexities before training, and the arithmetic of attention; the same for all seeds."""
    found, more = world(), {}
    for name, config in (("positions interpolated", found.config),
                         ("positions as they were", base_l.load().config)):  # fmt: skip
        more[f"base, {name}: perplexity"] = float(np.exp(measured(found.params, config).mean()))
    long = found.config.max_positions
    for name in ("LongLoRA", "full attention"):
        attend = kinds(long)[name].attend
        for length in (long, 2 * long):
            more[f"{name}: flops of attention at {length}"] = flops(attend, length, found.config)
    return more


def run(seed: int, workdir: Any) -> Figures:
    """Loss per held-out document, one seed."""
    found = world()
    long = found.config.max_positions
    # one rate for what differs in the attention alone
    rates = dict.fromkeys(kinds(long), best("full attention")) | {"LoRA alone": best("LoRA alone")}
    loss = {n: measured(trained(n, rates[n], seed)[0], found.config) for n in kinds(long)}
    more = {f"{name}: perplexity": float(np.exp(x.mean())) for name, x in loss.items()}
    more |= {f"{name}: rate": rate for name, rate in rates.items()}
    more |= of_the_base()
    more["LoRA alone minus LongLoRA"] = float((loss["LoRA alone"] - loss["LongLoRA"]).mean())
    names = ("LongLoRA", "full attention", "groups that are not moved")
    return Figures(found.units, *(tuple(loss[n].tolist()) for n in names), more=more)


CLAIM = Claim(
    name="long_lora",
    systems=("LongLoRA",),
    statement=f"held-out perplexity at {FACTOR} times the context of base L: trained with shifted "
    "groups of a quarter of a row <= 1.02 x trained with full attention",
    reference="Chen 2023, 2309.12307: close to full attention; norms and embeddings are needed",
    baseline="the same adapter trained with full attention",
    control="groups that are not moved: nothing passes between them in training",
    unit="loss",
    assets=("stdlib_texts",),
    run=run,
    margin=-float(np.log(1.02)),
    less_is_better=True,
)

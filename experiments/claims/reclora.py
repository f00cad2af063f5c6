r"""RecLoRA: users with few rows are served better by a mixed set than by one adapter or their own.

==========  ==============================================================================
user        a president; rows are passages of the addresses to Congress
p, n        a passage of the user, and one of another user of the same era
c_u         mean embedding of ten passages of the user (a short history, the prompt)
v_u         vector of the user from words of all rows but those judged (a long history)
e(x)        mean state of MiniLM with adapters in its last two layers, of length 1
==========  ==============================================================================

.. math::
    s_u(x) = e(x)^\top c_u, \qquad
    L = -\log \sigma\big(10\, (s_u(p) - s_u(n))\big), \qquad
    \mathrm{AUC}_u = \mathrm{P}\big(s_u(p) > s_u(n)\big)

Adapters are trained on four passages of each user. All of them see c_u; v_u, which only the set
reads, stands for the recommender that was trained on everybody's rows: the leading singular vectors
of the users' word counts, scaled by how few users have a word. The learning rate of each is the
best of three on validation rows, with a seed of its own.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.config import Config
from experiments.data import corpora
from experiments.stages import base_model
from jlora.methods import RecLoRA
from jlora.models import encoder

SITES = tuple(f"layers/attention/{s}/kernel" for s in ("query", "key", "value", "out"))
HISTORY, FEW, VALIDATION, TEST = 10, 4, 4, 10  # passages of a user
SIZE, WORDS = 16, 3000  # of v_u; words that are counted
TUNING = 1000  # the seed that rates are chosen with


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done."""

    base: str = "minilm"
    users: int = 99  # at most
    length: int = 40  # tokens of a passage
    steps: int = 80
    batch: int = 16  # pairs of a step
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)


PLAN = Plan()
QUICK = Plan(base="tiny", users=4, length=8, steps=3, batch=4, rates=(3e-3,))


class Texts(NamedTuple):
    """What all seeds share."""

    apply: Callable[..., jax.Array]  # (params, hidden, mask, c) -> scores; hashable
    upper: Any  # parameters of the last layers
    hidden: jax.Array  # [N, t, d], states that enter them
    mask: jax.Array  # [N, t]
    embedding: np.ndarray  # [N, d], of the base
    words: tuple[str, ...]  # the passages
    users: tuple[str, ...]
    own: tuple[np.ndarray, ...]  # rows of each user
    era: np.ndarray  # of each user


class Split(NamedTuple):
    """The rows of one seed."""

    few: jax.Array  # [users, FEW] int32
    many: jax.Array  # [users, m], all that are neither history nor judged, repeated to one number
    validation: jax.Array  # [users, VALIDATION]
    test: jax.Array  # [users, TEST]
    short: jax.Array  # c_u [users, d]
    long: jax.Array  # v_u [users, SIZE]
    rivals: jax.Array  # [users, most] other users of the era, repeated to one number


@functools.cache
def texts(plan: Plan) -> Texts:
    """Presidents with enough passages, and what the lower layers make of those."""
    corpus, rows = corpora.load("sotu"), collections.defaultdict(list)
    for k, unit in enumerate(corpus.units):
        rows[re.sub(r"^sotu/\d+_|_[a-z]{1,2}$", "", unit)].append(k)
    least = HISTORY + FEW + VALIDATION + TEST
    order = sorted(rows, key=lambda u: (corpus.labels[rows[u][0]], u))
    users = tuple(u for u in order if len(rows[u]) >= least)[: plan.users]
    chosen = [k for u in users for k in rows[u]]
    config = Config(base=plan.base, layers=2, max_length=plan.length)
    base = base_model.load(config, None)
    words = [corpus.texts[k] for k in chosen]
    parts = [base_model.states(base, words[k : k + 64], config, 64)
             for k in range(0, len(words), 64)]  # fmt: skip
    hidden, mask, embedding = (np.concatenate(t) for t in zip(*parts, strict=True))
    ends = np.cumsum([len(rows[u]) for u in users])
    own = tuple(np.split(np.arange(len(chosen)), ends[:-1]))
    era = np.asarray([corpus.labels[rows[u][0]] for u in users])
    return Texts(_scores(base.config), base_model.upper(base, config), jnp.asarray(hidden),
                 jnp.asarray(mask), embedding, tuple(words), users, own, era)  # fmt: skip


@functools.cache
def _scores(model: encoder.EncoderConfig) -> Callable[..., jax.Array]:
    def apply(upper: Any, hidden: jax.Array, mask: jax.Array, short: jax.Array) -> jax.Array:
        out = encoder.mean_pool(encoder.run(upper, hidden, mask, model), mask)
        return jnp.sum(out * short, axis=-1)

    return apply


def split(found: Texts, seed: int) -> Split:
    """Who is trained, asked and judged with what."""
    draw = np.random.default_rng(seed)
    order = [draw.permutation(own) for own in found.own]
    cuts = np.cumsum([HISTORY, TEST, VALIDATION])
    history, test, validation, rest = zip(*(np.split(own, cuts) for own in order), strict=True)
    most = max(map(len, rest))
    short = np.stack([found.embedding[h].mean(0) for h in history])
    short = short - short.mean(0)
    short /= np.linalg.norm(short, axis=-1, keepdims=True)
    long = vectors(found, [[*h, *r] for h, r in zip(history, rest, strict=True)])
    others = [np.flatnonzero((found.era == e) & (np.arange(len(order)) != k))
              for k, e in enumerate(found.era)]  # fmt: skip
    if not all(map(len, others)):
        raise ValueError("users: got one that is alone in its era, expected rivals")
    ints = lambda t: jnp.asarray(np.stack(t), jnp.int32)  # noqa: E731
    return Split(
        ints([r[:FEW] for r in rest]), ints([np.resize(r, most) for r in rest]),
        ints(validation), ints(test), jnp.asarray(short, jnp.float32),
        jnp.asarray(long, jnp.float32), ints([np.resize(o, len(order)) for o in others]),
    )  # fmt: skip


def vectors(found: Texts, rows: list[list[int]]) -> np.ndarray:
    """v_u [users, SIZE]: a plain model of who uses which words."""
    count = [collections.Counter(w for k in own for w in re.findall(r"[a-z]+",
             found.words[k].lower())) for own in rows]  # fmt: skip
    whole = sum(count, collections.Counter())
    words = [w for w, _ in whole.most_common(WORDS)]
    table = np.log1p(np.asarray([[c[w] for w in words] for c in count], np.float64))
    table *= np.log(len(rows) / (table > 0).sum(0))
    table = table - table.mean(0)
    u, s, _ = np.linalg.svd(table, full_matrices=False)
    out = np.zeros((len(rows), SIZE))
    kept = min(SIZE, len(s))
    out[:, :kept] = u[:, :kept] * s[:kept]
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


class Recipe(NamedTuple):
    """What is trained: one adapter for all, or one a user."""

    name: str
    method: Any
    each: bool = False
    rows: str = "few"


SET = Recipe("RecLoRA", RecLoRA(SIZE, experts=8, rank=4, alpha=4.0))
SHARED = Recipe("shared LoRA", jl.LoRA(32, alpha=32.0))  # as many numbers as the set's adapters
OWN = Recipe("one LoRA a user", jl.LoRA(4, alpha=4.0), each=True)
MANY = Recipe("shared LoRA, all rows", jl.LoRA(32, alpha=32.0), rows="many")


def trained(
    found: Texts, at: Split, recipe: Recipe, plan: Plan, rate: float, seed: int
) -> jl.Adapter:
    """An adapter; of `each` a bank with one per user."""
    example = found.hidden[:1], found.mask[:1], at.short[:1]
    methods = dict.fromkeys(SITES, recipe.method)
    keys = jax.random.split(jax.random.key(seed), len(found.users) if recipe.each else 1)
    many = [jl.init(k, found.apply, found.upper, *example, methods=methods) for k in keys]
    start = jl.stack(many) if recipe.each else many[0]
    static = found.apply, start.sites, recipe.each, plan.steps, plan.batch
    data = found.upper, found.hidden, found.mask, at, getattr(at, recipe.rows)
    one = _train(*static, *data, start.trainable, start.frozen, jnp.float32(rate), keys[0])
    return start.replace(trainable=one)


def _score(apply, each, adapter, upper, inputs, long, user):
    model = jl.lift(apply)
    if not each:
        return model(upper, adapter, *inputs, ctx={"user": long})
    alone = lambda k, *row: model(upper, adapter[k], *(t[None] for t in row))[0]  # noqa: E731
    return jax.vmap(alone)(user, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train(apply, sites, each, steps, batch, upper, hidden, mask, at, rows, start, frozen, rate,
           key):  # fmt: skip
    solver = optax.adam(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / steps)))

    def loss(one, user, text):
        both = jnp.concatenate([user, user])
        inputs = hidden[text], mask[text], at.short[both]
        adapter = jl.Adapter(one, frozen, sites)
        good, bad = jnp.split(_score(apply, each, adapter, upper, inputs, at.long[both], both), 2)
        return -jnp.mean(jax.nn.log_sigmoid(10.0 * (good - bad)))

    def step(carry, number):
        (one, state), keys = carry, jax.random.split(jax.random.fold_in(key, number), 4)
        draw = lambda k, most: jax.random.randint(keys[k], (batch,), 0, most)  # noqa: E731
        user = draw(0, rows.shape[0])
        rival = at.rivals[user, draw(1, at.rivals.shape[1])]
        text = [rows[user, draw(2, rows.shape[1])], rows[rival, draw(3, rows.shape[1])]]
        grads = jax.grad(loss)(one, user, jnp.concatenate(text))
        updates, state = solver.update(grads, state, one)
        return (optax.apply_updates(one, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
        numbers = jnp.arange(steps, dtype=jnp.int32)
        return jax.lax.scan(step, (start, solver.init(start)), numbers)[0][0]


_judge = jax.jit(_score, static_argnums=(0, 1))


def auc(
    found: Texts, at: Split, recipe: Recipe, adapter: jl.Adapter, rows: jax.Array, long: jax.Array
) -> np.ndarray:
    """AUC per user: its rows [users, k] against those of the rivals, one rival after the other."""
    out, k = [], rows.shape[1]
    for user in range(len(found.users)):
        rival = np.resize(np.unique(at.rivals[user]), 2 * k)
        bad = np.asarray(rows)[rival, np.arange(2 * k) % k]
        text = np.concatenate([rows[user], bad])
        who = jnp.full(len(text), user, jnp.int32)
        inputs = found.hidden[text], found.mask[text], at.short[who]
        score = _judge(found.apply, recipe.each, adapter, found.upper, inputs, long[who], who)
        good, bad = np.asarray(score[:k])[:, None], np.asarray(score[k:])[None]
        out.append(np.mean((good > bad) + 0.5 * (good == bad)))
    return np.asarray(out)


@functools.cache
def rate_of(plan: Plan, recipe: Recipe) -> float:
    """The learning rate that is best on validation rows."""
    found = texts(plan)
    at = split(found, TUNING)
    marks = []
    for rate in plan.rates:
        adapter = trained(found, at, recipe, plan, rate, TUNING)
        marks.append(auc(found, at, recipe, adapter, at.validation, at.long).mean())
    return plan.rates[int(np.argmax(marks))]


def run(seed: int, workdir: Path, plan: Plan = PLAN) -> Figures:
    """AUC per user; the baseline is the better of the shared LoRA and one LoRA a user."""
    found = texts(plan)
    at, marks, more = split(found, seed), {}, {}
    for recipe in (SET, SHARED, OWN, MANY):
        rate = rate_of(plan, recipe)
        adapter = trained(found, at, recipe, plan, rate, seed)
        marks[recipe.name] = auc(found, at, recipe, adapter, at.test, at.long)
        more |= {recipe.name: marks[recipe.name].mean(), f"{recipe.name}: rate": rate}
        if recipe is SET:
            other = np.roll(np.arange(len(found.users)), 1 + len(found.users) // 2)
            control = auc(found, at, recipe, adapter, at.test, at.long[other])
    more["users"] = len(found.users)
    best = max((SHARED.name, OWN.name), key=lambda n: marks[n].mean())
    figures = (tuple(map(float, t)) for t in (marks[SET.name], marks[best], control))
    return Figures(found.users, *figures, more={k: float(v) for k, v in more.items()})


CLAIM = Claim(
    name="reclora",
    systems=("RecLoRA",),
    statement=f"users with {FEW} rows each: AUC of RecLoRA > that of the better of a shared LoRA "
    "of as many numbers and one LoRA a user",
    reference="Zhu 2024, 2408.03533: personal adapters from a set, few rows for the language model "
    "and many for the recommender",
    baseline="the better of a shared LoRA of rank 32 and one LoRA of rank 4 a user",
    control="the vectors of other users",
    unit="AUC",
    assets=("minilm", "stdlib"),
    run=run,
)

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
of the users' word counts, scaled by how few users have a word. The baseline is the best, by the
test rows themselves, of what one would do without a set: no adapter, one LoRA for all, the same
with a vector per user that is trained and added to c_u (the token of a user's number), and one LoRA
per user. The learning rate of each is the best of three on validation rows, with a seed of its own.
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
        ints([r[:FEW] for r in rest]), ints(validation), ints(test),
        jnp.asarray(short, jnp.float32),
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


@dataclasses.dataclass(frozen=True)
class OwnLoRA(jl.LoRA):
    """One LoRA of rank `each` per user: columns of A and rows of B that no other user reads."""

    each: int = 4

    def apply(self, x: Any, w: Any, p: Any, ctx: Any) -> Any:
        a, b = self.factors(p)
        owner = jnp.arange(self.rank, dtype=jnp.int32) // self.each
        mine = owner[None] == ctx["number"][:, None]
        h = jnp.where(mine.reshape(len(mine), *[1] * (x.ndim - 2), -1), x @ a, 0.0)
        return x @ w + h @ b


class Recipe(NamedTuple):
    """What is trained: a method of (users) -> method, and maybe a vector per user."""

    name: str
    method: Callable[[int], Any]
    vector: bool = False


class Trained(NamedTuple):
    """What a recipe gives."""

    adapter: jl.Adapter
    shift: jax.Array  # [users, d], added to c_u; zeros without `Recipe.vector`


SET = Recipe("RecLoRA", lambda _: RecLoRA(SIZE, experts=8, rank=4, alpha=4.0))
SHARED = Recipe("shared LoRA", lambda _: jl.LoRA(32, alpha=32.0))  # as many numbers as the set has
TOKEN = Recipe("shared LoRA, a vector a user", SHARED.method, vector=True)
OWN = Recipe("one LoRA a user", lambda users: OwnLoRA(4 * users, alpha=4.0 * users))
BASELINES = (SHARED, TOKEN, OWN)
NOTHING = "no adapter"


def fresh(found: Texts, at: Split, recipe: Recipe, seed: int) -> Trained:
    """Before training: scores are those of the base."""
    example = found.hidden[:1], found.mask[:1], at.short[:1]
    methods = dict.fromkeys(SITES, recipe.method(len(found.users)))
    key = jax.random.key(seed)
    adapter = jl.init(key, found.apply, found.upper, *example, methods=methods)
    return Trained(adapter, jnp.zeros_like(at.short))


def trained(found: Texts, at: Split, recipe: Recipe, plan: Plan, rate: float, seed: int) -> Trained:
    """After `plan.steps` steps."""
    start = fresh(found, at, recipe, seed)
    static = found.apply, start.adapter.sites, recipe.vector, plan.steps, plan.batch
    data = found.upper, found.hidden, found.mask, at, start.adapter.frozen
    first = start.adapter.trainable, start.shift
    one, shift = _train(*static, *data, first, jnp.float32(rate), jax.random.key(seed))
    return Trained(start.adapter.replace(trainable=one), shift)


def _score(apply, one, upper, inputs, long, user):
    hidden, mask, short = inputs
    ctx = {"user": long, "number": user}
    return jl.lift(apply)(upper, one.adapter, hidden, mask, short + one.shift[user], ctx=ctx)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train(apply, sites, vector, steps, batch, upper, hidden, mask, at, frozen, start, rate, key):
    solver = optax.adam(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / steps)))

    def loss(one, user, text):
        both = jnp.concatenate([user, user])
        shift = one[1] if vector else jax.lax.stop_gradient(one[1])
        now = Trained(jl.Adapter(one[0], frozen, sites), shift)
        inputs = hidden[text], mask[text], at.short[both]
        good, bad = jnp.split(_score(apply, now, upper, inputs, at.long[both], both), 2)
        return -jnp.mean(jax.nn.log_sigmoid(10.0 * (good - bad)))

    def step(carry, number):
        (one, state), keys = carry, jax.random.split(jax.random.fold_in(key, number), 4)
        draw = lambda k, most: jax.random.randint(keys[k], (batch,), 0, most)  # noqa: E731
        user = draw(0, at.few.shape[0])
        rival = at.rivals[user, draw(1, at.rivals.shape[1])]
        text = [at.few[user, draw(2, FEW)], at.few[rival, draw(3, FEW)]]
        grads = jax.grad(loss)(one, user, jnp.concatenate(text))
        updates, state = solver.update(grads, state, one)
        return (optax.apply_updates(one, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
        numbers = jnp.arange(steps, dtype=jnp.int32)
        return jax.lax.scan(step, (start, solver.init(start)), numbers)[0][0]


_judge = jax.jit(_score, static_argnums=0)


def auc(found: Texts, at: Split, one: Trained, rows: jax.Array, long: jax.Array) -> np.ndarray:
    """AUC per user: its rows [users, k] against those of the rivals, one rival after the other."""
    out, k = [], rows.shape[1]
    for user in range(len(found.users)):
        rival = np.resize(np.unique(at.rivals[user]), 2 * k)
        bad = np.asarray(rows)[rival, np.arange(2 * k) % k]
        text = np.concatenate([rows[user], bad])
        who = jnp.full(len(text), user, jnp.int32)
        inputs = found.hidden[text], found.mask[text], at.short[who]
        score = _judge(found.apply, one, found.upper, inputs, long[who], who)
        good, bad = np.asarray(score[:k])[:, None], np.asarray(score[k:])[None]
        out.append(np.mean((good > bad) + 0.5 * (good == bad)))
    return np.asarray(out)


@functools.cache
def rate_of(plan: Plan, recipe: Recipe) -> float:
    """The learning rate that is best on validation rows."""
    if len(plan.rates) == 1:
        return plan.rates[0]
    found = texts(plan)
    at = split(found, TUNING)
    marks = []
    for rate in plan.rates:
        one = trained(found, at, recipe, plan, rate, TUNING)
        marks.append(auc(found, at, one, at.validation, at.long).mean())
    return plan.rates[int(np.argmax(marks))]


def run(seed: int, workdir: Path, plan: Plan = PLAN) -> Figures:
    """AUC per user; the baseline is the best of those without a set, on the test rows."""
    found = texts(plan)
    at = split(found, seed)
    marks = {NOTHING: auc(found, at, fresh(found, at, SHARED, seed), at.test, at.long)}
    more: dict[str, Any] = {"users": len(found.users)}
    for recipe in (SET, *BASELINES):
        rate = rate_of(plan, recipe)
        one = trained(found, at, recipe, plan, rate, seed)
        marks[recipe.name] = auc(found, at, one, at.test, at.long)
        more[f"{recipe.name}: rate"] = rate
        if recipe is SET:
            other = np.roll(np.arange(len(found.users)), 1 + len(found.users) // 2)
            control = auc(found, at, one, at.test, at.long[other])
    more |= {name: mark.mean() for name, mark in marks.items()}
    best = max((n for n in marks if n != SET.name), key=lambda n: marks[n].mean())
    figures = (tuple(map(float, t)) for t in (marks[SET.name], marks[best], control))
    return Figures(found.users, *figures, more={k: float(v) for k, v in more.items()})


CLAIM = Claim(
    name="reclora",
    systems=("RecLoRA",),
    statement=f"users with {FEW} rows each: AUC of RecLoRA > that of the best of no adapter, a "
    "shared LoRA of as many numbers, with and without a vector a user, and one LoRA a user",
    reference="Zhu 2024, 2408.03533: personal adapters from a set, few rows for the language model "
    "and many for the recommender",
    baseline="the best of no adapter, a shared LoRA of rank 32, the same with a trained vector a "
    "user, and one LoRA of rank 4 a user",
    control="the vectors of other users",
    unit="AUC",
    assets=("minilm", "stdlib"),
    run=run,
)

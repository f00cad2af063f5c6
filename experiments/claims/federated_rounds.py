r"""Rounds of federated training on the last layer of MiniLM, for any aggregation.

=========  ===================================================================================
K          clients; a leading axis of every array of theirs
p_k        share of client k of all training rows
W          the kernels of the layer, frozen on the clients
u_k, v_k   factors of client k, [d_in, R], [R, d_out]; columns beyond its rank are zero
=========  ===================================================================================

In a round every client takes some Adam steps from what the server sent, then the server
aggregates (`jlora.contracts.aggregation`):

.. math:: (\bar u, \bar v, E) = \mathrm{aggregate}(\{u_k, v_k\}, p), \qquad W \leftarrow W + E

The global model is :math:`W + \bar u \bar v`. A private client clips the gradient of every row to
a norm and adds normal noise to their sum, in each step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from jlora.algebra import Deltas, LowRank
from jlora.contracts.aggregation import Round
from jlora.federated import fed_sb

CLIENTS, ROUNDS, STEPS, BATCH = 6, 5, 20, 8
RATE, RANK = 5e-3, 4  # Adam's, as the adapters of the merging claims are trained
ETA = 1e-3  # size of the first full step that Fed-SB takes its bases from
SITES = tuple(f"layers/attention/{s}/kernel" for s in ("query", "key", "value", "out"))
TRAINED = {"uv": ("u", "v"), "v": ("v",), "core": ("core",)}

Params = Any  # parameters of the layer
State = dict[str, dict[str, jax.Array]]  # path -> what a client holds, [K, ...]


class Program(NamedTuple):
    """A federated system as the simulation runs it."""

    name: str
    aggregate: Callable[[LowRank, jax.Array], Round] | None  # of one site; None: never meet
    train: str = "uv"  # what clients train: "uv", "v", or a "core" between fixed bases
    ranks: tuple[int, ...] = (RANK,) * CLIENTS
    fresh: bool = False  # the average is merged into W, and clients start from new factors
    steps: int = STEPS  # of a client in a round
    batch: int = BATCH  # rows of a step
    clip: float = 0.0  # norm that the gradient of a row is clipped to; 0: not private
    noise: float = 0.0  # standard deviation of the noise on a step's sum of gradients, in clips


class Recipe(NamedTuple):
    """What a round is compiled for."""

    names: tuple[str, ...]  # of the arrays that are trained
    steps: int
    batch: int
    private: bool


class Texts(NamedTuple):
    """What clients train on."""

    apply: Callable[..., jax.Array]  # (params, hidden, mask, head) -> logits; hashable
    base: Params
    hidden: jax.Array  # [N, t, d] f32, states entering the layer
    mask: jax.Array  # [N, t] bool
    heads: jax.Array  # [tasks, 2, d] f32
    pool: jax.Array  # [K, n, 3] int32, (text, label, task) of a client's rows, then padding
    counts: jax.Array  # [K] int32, rows that are not padding


class Trained(NamedTuple):
    """What all rounds end with."""

    models: tuple[Params, ...]  # the global model; of clients that never meet: theirs
    sent: float  # bytes that a client sends up in a round, mean over clients
    loss: float  # mean training loss of the last round


def train(program: Program, texts: Texts, seed: int) -> Trained:
    """All rounds of one system.

    Args:
      program: the system.
      texts: of the clients.
      seed: of the start, the batches and the noise.
    """
    counts = texts.counts.astype(jnp.float32)
    shares = counts / counts.sum()
    base, state, loss = texts.base, start(program, texts, seed, 0), jnp.zeros(())
    mean: dict[str, LowRank] = {}
    for r in range(ROUNDS):
        key = jax.random.fold_in(jax.random.key(seed), r)
        private = (jnp.float32(program.clip), jnp.float32(program.noise))
        recipe = Recipe(TRAINED[program.train], program.steps, program.batch, program.clip > 0)
        shared = texts._replace(apply=None, base=base)
        state, loss = _round(texts.apply, recipe, shared, state, live(program), private, key)
        if program.aggregate is None:
            continue
        for path in SITES:
            found = program.aggregate(factors(state[path]), shares)
            mean[path] = found.mean
            if found.residual is not None:
                base = added(base, {path: found.residual})
            if not program.fresh:
                state[path] = sent_down(program, found.mean, state[path])
        if program.fresh:
            base = added(base, mean)
            state = start(program, texts._replace(base=base), seed, r + 1)
    if program.aggregate is None:
        own = [{p: LowRank(*(x[k] for x in factors(state[p]))) for p in SITES}
               for k in range(len(program.ranks))]  # fmt: skip
        models = tuple(added(base, o) for o in own)
    else:
        models = (base if program.fresh else added(base, mean),)
    return Trained(models, sent_up(program, texts.hidden.shape[-1]), float(loss))


def start(program: Program, texts: Texts, seed: int, number: int) -> State:
    """What the clients start from: LoRA's start, the same for all; or bases from a gradient.

    Args:
      program: the system.
      texts: of the clients.
      seed: of the first factors.
      number: of the round.
    """
    key, rank = jax.random.key(seed + 1000 * number), max(program.ranks)
    if program.train == "core":
        k = len(program.ranks)
        found = {p: fed_sb.bases(g, rank, eta=ETA) for p, g in first_gradient(texts).items()}
        return {p: {n: jnp.broadcast_to(x, (k, *x.shape))
                    for n, x in zip(("left", "core", "right"), b, strict=True)}
                for p, b in found.items()}  # fmt: skip
    example = texts.hidden[:1], texts.mask[:1], texts.heads[:1]
    methods = dict.fromkeys(SITES, jl.LoRA(rank=rank, alpha=float(rank)))
    fresh = jl.init(key, texts.apply, texts.base, *example, methods=methods)
    keep = live(program)
    out = {}
    for path in SITES:
        a, b = (fresh.trainable[path][n] for n in "ab")  # [1, ...], as all clients hold them
        out[path] = {"u": a * keep[:, None, :], "v": b * keep[:, :, None]}
    return out


def live(program: Program) -> jax.Array:
    """[K, R] float32: 1 for the ranks that a client has."""
    at = jnp.arange(max(program.ranks))[None, :]
    return (at < jnp.asarray(program.ranks)[:, None]).astype(jnp.float32)


def factors(held: Mapping[str, jax.Array]) -> LowRank:
    """The factors of one site, [K, d_in, R] and [K, R, d_out]."""
    if "core" in held:
        return LowRank(jnp.matmul(held["left"], held["core"]), held["right"])
    return LowRank(held["u"], held["v"])


def sent_down(program: Program, mean: LowRank, held: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What the clients hold of one site after they have read the server's mean."""
    keep, k = live(program), len(program.ranks)
    if program.train == "core":  # orthonormal bases: the core of L C is C
        core = jnp.matmul(held["left"][0].T, mean.u)
        return {**held, "core": jnp.broadcast_to(core, held["core"].shape)}
    v = jnp.broadcast_to(mean.v, (k, *mean.v.shape)) * keep[:, :, None]
    u = jnp.broadcast_to(mean.u, (k, *mean.u.shape)) * keep[:, None, :]
    return {"u": held["u"] if program.train == "v" else u, "v": v}


def sent_up(program: Program, width: int) -> float:
    """Bytes of float32 that a client sends up in a round, mean over clients."""
    per = {"uv": lambda r: 2 * width * r, "v": lambda r: width * r, "core": lambda r: r * r}
    return float(4 * len(SITES) * np.mean([per[program.train](r) for r in program.ranks]))


def added(base: Params, deltas: Mapping[str, LowRank]) -> Params:
    """The parameters with low-rank deltas added to their kernels [1, d_in, d_out]."""

    def one(path, leaf):
        name = "/".join(str(k.key) for k in path)
        return leaf + _product(*deltas[name])[None] if name in deltas else leaf

    return jax.tree_util.tree_map_with_path(one, base)


@jax.jit
def _product(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(u, v, precision=jax.lax.Precision.HIGHEST)


def first_gradient(texts: Texts, rows: int = 16) -> dict[str, jax.Array]:
    """{path: [d_in, d_out]}: the gradient of the kernels on some rows of every client."""
    found = texts.pool[:, :rows].reshape(-1, 3)
    grads = _gradient(texts.apply, texts._replace(apply=None), found)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    named = {"/".join(str(k.key) for k in path): g[0] for path, g in leaves}
    return {p: named[p] for p in SITES}


def _loss(apply: Callable, base: Params, texts: Texts, rows: jax.Array) -> jax.Array:
    index, label, task = rows[:, 0], rows[:, 1], rows[:, 2]
    logits = apply(base, texts.hidden[index], texts.mask[index], texts.heads[task])
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


@functools.partial(jax.jit, static_argnums=0)
def _gradient(apply: Callable, texts: Any, rows: jax.Array) -> Params:
    return jax.grad(lambda base: _loss(apply, base, texts, rows))(texts.base)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round(
    apply: Callable, recipe: Recipe, texts: Any, state: State, keep: jax.Array,
    level: tuple[jax.Array, jax.Array], key: jax.Array,
) -> tuple[State, jax.Array]:  # fmt: skip
    """The local steps of all clients; their state and mean loss."""
    solver = optax.adam(RATE)
    model = jl.lift(apply)
    shape = jax.eval_shape(lambda: jl.init(key, apply, texts.base, texts.hidden[:1], texts.mask[:1],
                                           texts.heads[:1], methods=dict.fromkeys(
                                               SITES, jl.LoRA(rank=1, alpha=1.0))))  # fmt: skip
    sites = [site for site, _ in shape.sites]

    def loss(some, rest, rows):
        low = {p: factors({**rest[p], **some[p]}) for p in SITES}
        deltas: Deltas = {p: LowRank(u[None], v[None]) for p, (u, v) in low.items()}
        adapter = jl.merging.to_adapter(deltas, sites)
        return _loss(lambda base, *x: model(base, adapter, *x), texts.base, texts, rows)

    def slope(some, rest, rows, key):
        if not recipe.private:
            return jax.value_and_grad(loss)(some, rest, rows)
        values, grads = jax.vmap(jax.value_and_grad(loss), (None, None, 0))(
            some, rest, rows[:, None]
        )
        return values.mean(), privately(grads, *level, key)

    def client(held, alive, pool, count, key):
        some = {p: {n: held[p][n] for n in recipe.names} for p in SITES}
        rest = {p: {n: x for n, x in held[p].items() if n not in recipe.names} for p in SITES}

        def step(carry, key):
            some, moments = carry
            draw, noise = jax.random.split(key)
            rows = pool[jax.random.randint(draw, (recipe.batch,), 0, count)]
            value, grads = slope(some, rest, rows, noise)
            grads = masked(grads, alive)
            with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
                updates, moments = solver.update(grads, moments, some)
            return (optax.apply_updates(some, updates), moments), value

        first = some, solver.init(some)
        (last, _), values = jax.lax.scan(step, first, jax.random.split(key, recipe.steps))
        done = cast(State, last)
        return {p: {**rest[p], **done[p]} for p in SITES}, values.mean()

    keys = jax.random.split(key, keep.shape[0])
    state, losses = jax.vmap(client)(state, keep, texts.pool, texts.counts, keys)
    return state, losses.mean()


def masked(grads: State, alive: jax.Array) -> State:
    """Gradients of factors, zero beyond the rank of a client (`alive` [R])."""
    at = {"u": alive[None, :], "v": alive[:, None]}
    return {p: {n: g * at[n] if n in at else g for n, g in d.items()} for p, d in grads.items()}


def privately(grads: Any, clip: jax.Array, noise: jax.Array, key: jax.Array) -> Any:
    """The mean of gradients per row [n, ...], each clipped to a norm, with noise on their sum."""
    leaves, shape = jax.tree.flatten(grads)
    squared = sum(jnp.sum(g.reshape(g.shape[0], -1) ** 2, axis=1) for g in leaves)
    factor = jnp.minimum(1.0, clip * jax.lax.rsqrt(squared + 1e-12))
    keys = jax.random.split(key, len(leaves))
    out = [
        (jnp.einsum("n,n...->...", factor, g) + noise * clip * jax.random.normal(k, g.shape[1:]))
        / jnp.float32(g.shape[0])
        for g, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(shape, out)

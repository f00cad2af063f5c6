r"""Routers: which experts every token goes to, with which weights, and how evenly.

=========  ==========================================================================
l          logits, [T, E] (T stands for any leading axes of tokens)
I_t, g_t   ids and weights of the k experts that token t goes to, [T, k]; a choice with
           weight 0 is none: token t goes to fewer, or the expert was full
f          load: the share of the choices that fell on each expert, [E]
m          mask [T]: False where a token is padding, which counts in nothing
s          balance state, a PyTree; the last axis of its arrays is the experts
=========  ==========================================================================

A system gives ``init_state(experts) -> s`` and ``route(l, s, train, m) -> (Routes, s')``. Nothing
is hidden: what a router remembers of its load is in s', and only training changes it. Then

.. math::
    f_e = \frac{\sum_t m_t [e \in I_t]}{\sum_t m_t |I_t|}, \qquad
    \sum_j g_{t,j} = 1 \;\text{or}\; \sum_{e \in I_t} P(l_t)_e

where P is the probability that a system declares.

Laws, each an error of numbers that are about 1:

============  ============================================================================
weights       not negative, and their sum is 1 or that of the declared probabilities
              of the experts that a token goes to
ids           integers below E, all different for one token
load          f is what the ids say
experts       experts in another order (logits and state) are chosen in that order
tokens        tokens in another order have the same routes; load, balance and s' do not change
padded        masked tokens count in nothing, whatever they are, and a batch of them is finite
scan          a scan over layers is the loop over them
inference     without training s' is s, bit for bit
gradient      the weights of a token have a derivative by the logits of the experts chosen
jit           jitted is eager
============  ============================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlora.contracts.distance import gap, same_bits
from jlora.system import System
from jlora.types import Tree

LAWS = (
    *("weights", "ids", "load", "experts", "tokens", "padded", "scan", "inference", "gradient"),
    "jit",
)


class Routes(NamedTuple):
    """Where every token goes."""

    ids: Int[Array, "*T k"]  # int32, the chosen experts, best first
    weights: Float[Array, "*T k"]  # not negative; 0: the token does not go there
    balance: Float[Array, ""]  # the balance loss; 0 of routers that have none
    load: Float[Array, "E"]  # share of the choices, sums to 1


State = Tree  # of arrays [..., E] or []; () of a router that remembers nothing
Route = Callable[[Array, State, bool, Array | None], tuple[Routes, State]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(System):
    """The record of a router.

    Attributes:
      init_state: the number of experts -> the balance state before the first batch.
      route: (logits [*T, E]; state; whether to train, static; mask [*T] or None) -> (`Routes`, the
        state for the next batch).
      probability: logits [*T, E] -> [*T, E], whose sum over the chosen experts is the sum of a
        token's weights; None: they sum to 1.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/router_test.py",)

    init_state: Callable[[int], State]
    route: Route
    probability: Callable[[Array], Array] | None = None


class World(NamedTuple):
    """What the laws are measured on."""

    logits: Float[Array, "L T E"]  # of a few layers, without ties
    state: State  # of one layer, after a batch of training
    mask: Bool[Array, "T"]  # some tokens are padding


def world(record: Router, seed: int = 0) -> World:
    """Random logits of three layers, 12 tokens and 5 experts, and a state that has seen a batch.

    Args:
      record: the system.
      seed: of the draws.

    Returns:
      The world.
    """
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(2 * rng.normal(size=(3, 12, 5)), jnp.float32)
    _, state = record.route(logits[0] + 1.0, record.init_state(5), True, None)
    return World(logits, state, jnp.arange(12) % 4 != 1)


def error(law: str, record: Router, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds.
    """
    return CHECKS[law](record, at)


def dense_weights(routes: Routes) -> np.ndarray:
    """The weights of all experts, zero for those that were not chosen.

    Args:
      routes: of T tokens.

    Returns:
      [T, E], float64.
    """
    rows = np.zeros((routes.ids.shape[0], routes.load.shape[0]))
    np.put_along_axis(rows, np.asarray(routes.ids), np.asarray(routes.weights, "f8"), axis=1)
    return rows


def weights(record: Router, at: World) -> float:
    """How negative a weight is, or how far the weights of a token are from their sum.

    Args and Returns are those of `error`.
    """
    routes, _ = record.route(at.logits[0], at.state, True, None)
    g, want = np.asarray(routes.weights, "f8"), np.ones(len(routes.weights))
    if record.probability is not None:
        p = np.asarray(record.probability(at.logits[0]), "f8")
        want = (np.take_along_axis(p, np.asarray(routes.ids), axis=1) * (g != 0)).sum(1)
    error = max(float(np.max(-g)), float(np.max(np.abs(g.sum(1) - want))), 0.0)
    return error if np.isfinite(g).all() else float("inf")


def ids(record: Router, at: World) -> float:
    """The share of ids that are no expert, or the same as another one of their token.

    Args and Returns are those of `error`.
    """
    got = np.asarray(record.route(at.logits[0], at.state, True, None)[0].ids)
    if not np.issubdtype(got.dtype, np.integer):
        return float("inf")
    wrong = (got < 0) | (got >= at.logits.shape[-1])
    again = (got[:, :, None] == got[:, None, :]).sum(-1) > 1
    return float(np.mean(wrong | again))


def load(record: Router, at: World) -> float:
    """Against counts of the ids, with and without a mask.

    Args and Returns are those of `error`.
    """
    worst = 0.0
    for mask in (None, at.mask):
        routes, _ = record.route(at.logits[0], at.state, True, mask)
        kept = np.asarray(routes.weights) != 0
        kept &= True if mask is None else np.asarray(mask)[:, None]
        real = np.asarray(routes.ids)[kept]
        counts = np.bincount(real, minlength=at.logits.shape[-1])
        worst = max(worst, gap(routes.load, counts / real.size))
    return worst


def experts(record: Router, at: World) -> float:
    """Experts in another order, against the routes in the old one with their names changed.

    Args and Returns are those of `error`.
    """
    order = np.array([3, 0, 4, 1, 2])
    reorder = lambda t: t[..., order] if np.ndim(t) else t  # noqa: E731
    turned, after = record.route(reorder(at.logits[0]), jax.tree.map(reorder, at.state), True, None)
    routes, state = record.route(at.logits[0], at.state, True, None)
    got = (dense_weights(turned), turned.balance, turned.load, after)
    want = (reorder(dense_weights(routes)), routes.balance, reorder(routes.load))
    return gap(got, (*want, jax.tree.map(reorder, state)))


def tokens(record: Router, at: World) -> float:
    """Tokens in reverse.

    Args and Returns are those of `error`.
    """
    turned, after = record.route(at.logits[0, ::-1], at.state, True, None)
    routes, state = record.route(at.logits[0], at.state, True, None)
    got = (dense_weights(turned)[::-1], turned.balance, turned.load, after)
    return gap(got, (dense_weights(routes), routes.balance, routes.load, state))


def padded(record: Router, at: World) -> float:
    """With a mask, against the batch without the masked tokens; infinite where that is not.

    Args and Returns are those of `error`.
    """
    real = np.flatnonzero(np.asarray(at.mask))
    ragged, state = record.route(at.logits[0, real], at.state, True, None)
    noise = jnp.where(at.mask[:, None], at.logits[0], 50.0 * at.logits[1])
    masked, after = record.route(noise, at.state, True, at.mask)
    none = record.route(noise, at.state, True, jnp.zeros_like(at.mask))
    if not all(np.isfinite(np.asarray(t)).all() for t in jax.tree.leaves(none)):
        return float("inf")
    got = (dense_weights(masked)[real], masked.balance, masked.load, after)
    return gap(got, (dense_weights(ragged), ragged.balance, ragged.load, state))


def scan(record: Router, at: World) -> float:
    """A scan over layers with a state each, against the loop.

    Args and Returns are those of `error`.
    """
    layers = range(len(at.logits))
    states = jax.tree.map(lambda t: jnp.stack([t * (1 + k) for k in layers]), at.state)

    def layer(done: None, given: Tree) -> tuple[None, Tree]:
        logits, state = given
        return done, record.route(logits, state, True, None)

    worst = 0.0
    _, scanned = jax.lax.scan(layer, None, (at.logits, states))
    for k in layers:
        one = record.route(at.logits[k], jax.tree.map(lambda t: t[k], states), True, None)  # noqa: B023
        error = gap(jax.tree.map(lambda t: t[k], scanned), one)  # noqa: B023
        worst = max(worst, error)
    return worst


def inference(record: Router, at: World) -> float:
    """0, or infinity where a bit of the state changes.

    Args and Returns are those of `error`.
    """
    _, after = record.route(at.logits[0], at.state, False, None)
    return 0.0 if same_bits(after, at.state) else float("inf")


def gradient(record: Router, at: World) -> float:
    """The share of choices whose logits do not move their token's weights.

    Args and Returns are those of `error`.
    """
    routes, _ = record.route(at.logits[0], at.state, True, None)
    slopes = jnp.linspace(1.0, 2.0, routes.ids.shape[1])  # weights that sum to 1 move against them

    def total(logits: Array) -> Array:
        return jnp.sum(record.route(logits, at.state, True, None)[0].weights * slopes[None])

    by_logits = np.asarray(jax.grad(total)(at.logits[0]))
    chosen = np.take_along_axis(by_logits, np.asarray(routes.ids), axis=1)
    kept = np.asarray(routes.weights) != 0
    return float(np.mean((chosen == 0)[kept])) if np.isfinite(chosen).all() else float("inf")


def jit(record: Router, at: World) -> float:
    """Jitted against eager, in training and not.

    Args and Returns are those of `error`.
    """
    compiled = jax.jit(record.route, static_argnums=2)
    return max(
        gap(
            compiled(at.logits[0], at.state, train, at.mask),
            record.route(at.logits[0], at.state, train, at.mask),
        )
        for train in (True, False)
    )


CHECKS: Mapping[str, Callable[[Router, World], float]] = {
    "weights": weights,
    "ids": ids,
    "load": load,
    "experts": experts,
    "tokens": tokens,
    "padded": padded,
    "scan": scan,
    "inference": inference,
    "gradient": gradient,
    "jit": jit,
}

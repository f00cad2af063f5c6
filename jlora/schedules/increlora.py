r"""IncreLoRA: every site starts with few ranks; the most important ones get more, up to a budget.

=============  =================================================================================
A, e, B        arrays of `jlora.methods.AdaLoRA`, of R ranks, the room that there is
n_l            active ranks of site (or layer) l; D its delta, of them alone, G the gradient of D
I, U           smoothed score of a site, and how uncertain it is
k              ranks of the reserve: trained before they are active, at a fixed small e
=============  =================================================================================

.. math:: D = \frac{\alpha}{n + 10^{-5}} \, A_{:, :n} \, \mathrm{diag}(e_{:n}) \, B_{:n, :}, \qquad
          S = \frac{\sum_{ij} |D_{ij} G_{ij}|}{\sqrt{d_{in} d_{out}}}

.. math:: \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) S, \qquad
          \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |S - \bar I|

Every `interval` steps after the warm-up, the h sites of the largest :math:`\bar I \bar U` make
their reserve active, k ranks each, and get a new one, until the budget is spent; then the last
reserves are dropped. A reserve has e = 1e-5, which is not trained, while its factors are: it is
there in the forward pass, and its update is as large as any under Adam. New ranks have a learning
rate that rises from zero over steps of their own, and moments that count from their own start.

A step: the gradient of ``loss(shown(adapter, state, plan))``; an update by `late_adam`; then
`grow`.

Paper: Zhang et al. 2023, arXiv:2308.12043.
Source: paper and official code.
Deviates: the budget is met exactly (the code may exceed it); a site cannot outgrow R.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from jlora.contracts.schedule import Schedule, Trainable
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.adalora import TINY, AdaLoRA
from jlora.schedules import ranks
from jlora.types import Dynamic, Tree

SMALL = 1e-5  # e of a reserve


@dataclasses.dataclass(frozen=True)
class Growth:
    """When which sites grow. Raises ValueError for numbers below what they can be."""

    target: int  # active ranks at last, of all sites together
    first: int = 1  # active ranks of each site at the start
    by: int = 1  # k; the official code has 1, 2, 3, 4 for mean targets of 2, 4, 6, 8
    top: int = 2  # h, sites that grow at once
    warmup: int = 1000  # steps before the first growth
    interval: int = 1000  # steps between two of them
    late: int = 0  # steps over which the learning rate of new ranks rises; 0: at once
    rescale: bool = True  # alpha / n as published; False: alpha / R, so that growing changes little
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        if min(self.first, self.by, self.top, self.interval, self.target) < 1 or min(
            self.warmup, self.late
        ) < 0 or not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):  # fmt: skip
            raise ValueError(f"Growth: got {self}, expected positive numbers, betas between 0 and "
                             "1")  # fmt: skip


class State(NamedTuple):
    """State of the growth; every dict is by path."""

    step: Int32[Array, ""]  # the last one that was observed, -1 before the first
    active: dict[str, Array]  # int32 [*stack], n
    sensitivity: dict[str, Array]  # [*stack]
    uncertainty: dict[str, Array]  # [*stack]
    age: dict[str, Array]  # int32 [*stack, R], steps that a rank has been trained


def start(adapter: Adapter, plan: Growth) -> State:
    """The state before the first step.

    Args:
      adapter: of `jlora.methods.AdaLoRA` sites.
      plan: when which sites grow.

    Returns:
      `plan.first` active ranks at every site and layer.

    Raises:
      ValueError: a site of another method, or without room for one growth; a target that the sites
        cannot reach exactly.
    """
    for site, method in adapter.sites:
        if not isinstance(method, AdaLoRA) or method.rank < plan.first + plan.by:
            raise ValueError(f"{site.path}: got {method}, expected AdaLoRA of rank >= "
                             f"{plan.first + plan.by}")  # fmt: skip
    whole = ranks.full(adapter)
    count = plan.first * sum(m[..., 0].size for m in whole.values())
    room = sum(m[..., 0].size * ((m.shape[-1] - plan.first) // plan.by * plan.by)
               for m in whole.values())  # fmt: skip
    if not 0 <= plan.target - count <= room or (plan.target - count) % plan.by:
        raise ValueError(f"target: got {plan.target}, expected {count} plus a multiple of "
                         f"{plan.by} of at most {room}")  # fmt: skip
    active = {p: jnp.full(m.shape[:-1], plan.first, jnp.int32) for p, m in whole.items()}
    zero = {p: jnp.zeros(m.shape[:-1], jnp.float32) for p, m in whole.items()}
    age = {p: jnp.zeros(m.shape, jnp.int32) for p, m in whole.items()}
    return State(jnp.asarray(-1, jnp.int32), active, zero, zero, age)


def masks(state: State) -> dict[str, Array]:
    """Masks of the active ranks.

    Args:
      state: of the growth.

    Returns:
      {path: bool [*stack, R]}.
    """
    return {p: jnp.arange(state.age[p].shape[-1]) < n[..., None] for p, n in state.active.items()}


def trained(state: State, plan: Growth) -> dict[str, Array]:
    """Masks of the ranks whose factors are trained: the active ones, and the reserve.

    Args:
      state: of the growth.
      plan: says how large a reserve is; there is none once the budget is spent.

    Returns:
      {path: bool [*stack, R]}.
    """
    more = jnp.where(total(state) < plan.target, plan.by, 0)
    return {p: jnp.arange(state.age[p].shape[-1]) < n[..., None] + more
            for p, n in state.active.items()}  # fmt: skip


def total(state: State) -> Int32[Array, ""]:
    """How many ranks are active.

    Args:
      state: of the growth.

    Returns:
      int32 [], over all sites and layers.
    """
    return sum((jnp.sum(n) for n in state.active.values()), jnp.zeros((), jnp.int32))


def shown(adapter: Adapter, state: State, plan: Growth) -> Adapter:
    """The adapter in the loss: active ranks, and the reserve at its small e.

    Args:
      adapter: in training.
      state: of the growth.
      plan: when which sites grow.

    Returns:
      An adapter of the same shapes; no gradient reaches e of ranks that are not active.
    """
    live, near, out = masks(state), trained(state, plan), dict(adapter.trainable)
    for path, m in live.items():
        own = adapter.trainable[path]
        rest = jnp.where(near[path], jnp.asarray(SMALL, own["e"].dtype), 0)
        out[path] = {**own, "e": jnp.where(m, own["e"], rest)}
    return _scaled(adapter.replace(trainable=out), live, plan)


def mask(adapter: Adapter, kept: ranks.Masks, plan: Growth) -> Adapter:
    """The adapter of the active ranks alone, as it is used after training.

    Args:
      adapter: in training.
      kept: as of `masks`; `jlora.schedules.ranks.shrink` with them makes it small.
      plan: says what the scale is.

    Returns:
      An adapter of the same shapes.
    """
    return _scaled(ranks.zeroed(adapter, kept, ("e",)), kept, plan)


def _scaled(adapter: Adapter, kept: ranks.Masks, plan: Growth) -> Adapter:
    """The scale alpha / (n + 1e-5) in the place of alpha / (R + 1e-5)."""
    if not plan.rescale:
        return adapter
    frozen = dict(adapter.frozen)
    for site, method in adapter.sites:
        scale = adapter.frozen[site.path]["scale"]
        n = jnp.sum(kept[site.path], axis=-1).astype(scale.dtype)
        ratio = (method.rank + TINY) / (n + TINY)  # type: ignore[attr-defined]
        frozen[site.path] = {**adapter.frozen[site.path], "scale": scale * ratio}
    return adapter.replace(frozen=frozen)


def grow(
    state: State, adapter: Adapter, gradients: Trainable, plan: Growth,
    dense: Mapping[str, Float[Array, "*stack d_in d_out"]] | None = None,
) -> tuple[State, Adapter]:  # fmt: skip
    """What follows an optimizer's update: scores, and new ranks where they are due.

    Args:
      state: before the step.
      adapter: after the update.
      gradients: of its trainable.
      plan: when which sites grow.
      dense: G of every site, such as the gradient of the weight itself; None: the score is that of
        the ranks, :math:`\\sum_k |e_k \\partial L / \\partial e_k|` in the place of the sum over
        entries of D, which needs no array of the size of a weight.

    Returns:
      The state and the adapter after the step: e of ranks that become active is that of a reserve.
    """
    live, growing = masks(state), total(state) < plan.target
    near = trained(state, plan)
    age = {p: a + near[p].astype(jnp.int32) for p, a in state.age.items()}
    sens, unc = {}, {}
    for site, _ in adapter.sites:
        p, room = site.path, (site.d_in * site.d_out) ** 0.5
        if dense is None:
            at = jnp.abs(adapter.trainable[p]["e"] * gradients[p]["e"])
            score = jnp.sum(jnp.where(live[p], at, 0), axis=-1)
        else:
            t, s = mask(adapter, live, plan), None
            s = t.frozen[p]["scale"][..., None, None]
            d = s * (t.trainable[p]["a"] * t.trainable[p]["e"][..., None, :]) @ t.trainable[p]["b"]
            score = jnp.sum(jnp.abs(d * dense[p]), axis=(-2, -1))
        score = score.astype(jnp.float32) / room
        mean = plan.beta1 * state.sensitivity[p] + (1 - plan.beta1) * score
        spread = plan.beta2 * state.uncertainty[p] + (1 - plan.beta2) * jnp.abs(score - mean)
        sens[p] = jnp.where(growing, mean, state.sensitivity[p])
        unc[p] = jnp.where(growing, spread, state.uncertainty[p])
    step = state.step + 1
    due = growing & (step > plan.warmup) & (step % plan.interval == 0)
    state = State(step, state.active, sens, unc, age)
    more = _winners(state, plan)
    active = {p: n + jnp.where(due & more[p], plan.by, 0) for p, n in state.active.items()}
    state = state._replace(active=active)
    out = dict(adapter.trainable)
    for p, m in masks(state).items():
        own = adapter.trainable[p]
        out[p] = {**own, "e": jnp.where(m & ~live[p], jnp.asarray(SMALL, own["e"].dtype), own["e"])}
    return state, adapter.replace(trainable=out)


def _winners(state: State, plan: Growth) -> dict[str, Array]:
    """Which sites grow: the h most important ones that have room, within the budget."""
    score = {}
    for p, i in state.sensitivity.items():
        fits = state.active[p] + plan.by <= state.age[p].shape[-1]
        score[p] = jnp.where(fits, i * state.uncertainty[p], -jnp.inf)
    flat = jnp.concatenate([jnp.ravel(s) for s in score.values()])
    most = jnp.minimum(plan.top, (plan.target - total(state)) // plan.by)
    place = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
    won, out, at = (place < most) & jnp.isfinite(flat), {}, 0
    for p, s in score.items():
        out[p], at = won[at : at + s.size].reshape(s.shape), at + s.size
    return out


class LateState(NamedTuple):
    """State of `late_adam`."""

    mu: Tree  # first moments
    nu: Tree  # second moments


def late_adam(
    rate: float | Callable[[Dynamic], Dynamic], plan: Growth, *, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Adam in which every rank counts steps from its own start.

    Its `update` is called with ``growth=state``, of before the step. Ranks that are not trained get
    updates of zero.

    Args:
      rate: learning rate, or the step of the training -> it.
      plan: says over how many of its own steps a rank's learning rate rises (`late`). The ranks of
        the start do not wait.
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the root of the second moments.

    Returns:
      A transformation of trees like `Adapter.trainable`, of AdaLoRA sites.
    """

    def init(params: Tree) -> LateState:
        zero = jax.tree.map(jnp.zeros_like, params)
        return LateState(zero, zero)

    def update(
        updates: Tree, state: LateState, params: Tree = None, *, growth: State, **_: Dynamic
    ) -> tuple[Tree, LateState]:
        del params
        live, near, out = masks(growth), trained(growth, plan), {}
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, state.nu, updates)
        step = growth.step + 1
        eta = rate(step) if callable(rate) else rate
        for p, own in updates.items():  # type: ignore[union-attr]
            age = jnp.maximum(growth.age[p] + 1, 1).astype(jnp.float32)
            late = growth.age[p] < step  # not there from the start
            rise = jnp.where(late & (plan.late > 0), jnp.minimum(1, age / max(plan.late, 1)), 1.0)
            out[p] = {}
            for n, g in own.items():
                axis = -2 if n == "b" else -1
                count, up, kept = (
                    ranks.along(x, g, axis) for x in (age, rise, live[p] if n == "e" else near[p])
                )
                first = mu[p][n] / (1 - b1**count).astype(g.dtype)
                second = nu[p][n] / (1 - b2**count).astype(g.dtype)
                moved = -eta * up.astype(g.dtype) * first / (jnp.sqrt(second) + eps)
                out[p][n] = jnp.where(kept, moved.astype(g.dtype), jnp.zeros_like(g))
        return out, LateState(mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


# The record: two sites of room 4 grow from 1 rank each to 5 together, one rank per step.
_PLAN = Growth(target=5, top=1, warmup=0, interval=1)


def _observe(state: Tree, adapter: Adapter, gradients: Trainable) -> Tree:
    return grow(state, adapter, gradients, _PLAN)[0]  # type: ignore[arg-type]


def _shrink(adapter: Adapter, state: Tree, kept: dict[str, Array]) -> tuple[Adapter, Dynamic]:
    return ranks.shrink(mask(adapter, kept, _PLAN), state, kept)


SYSTEM = Schedule(
    name="IncreLoRA",
    paper="Zhang 2023, 2308.12043",
    symbol="grow",
    claim="increlora",
    evidence="scores by numpy; budget met exactly; late ranks are moved as by an Adam of their own",
    rows=(34,),
    examples=(AdaLoRA(rank=4, alpha=2.0),),
    start=lambda adapter: start(adapter, _PLAN),
    observe=_observe,
    masks=lambda state, step: masks(state),
    mask=lambda adapter, kept: mask(adapter, kept, _PLAN),
    shrink=_shrink,
    budget=lambda adapter, step: _PLAN.target,
    length=5,
)

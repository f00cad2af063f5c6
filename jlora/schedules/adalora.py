r"""AdaLoRA's allocation: the ranks of all sites compete for a budget that falls.

=================  =============================================================================
A, e, B            arrays of `jlora.methods.AdaLoRA`; w any of their entries, g its gradient
I, U               smoothed sensitivity of an entry, and how uncertain it is
S_k                importance of rank k of a site
b(n)               budget of step n: how many ranks all sites keep together
t_i, t_f, T        steps before the budget falls, steps after it has fallen, all steps
=================  =============================================================================

.. math:: \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) |w g|, \qquad
          \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) \big| |w g| - \bar I \big|

.. math:: S_k = s(e_k) + \tfrac1{d_{in}} \sum_i s(A_{ik}) + \tfrac1{d_{out}} \sum_j s(B_{kj}),
          \qquad s = \bar I \, \bar U

.. math:: b(n) = b_T + (b_0 - b_T) \Big(1 - \frac{n - t_i}{T - t_i - t_f}\Big)^3

Every `interval` steps, and in each of the last t_f, the b(n) ranks of the largest S are kept and e
of the others becomes zero. They keep their factors, so e has a gradient and they can come back
until scores rest, in the last t_f steps. One step: `observe` with gradients, then `mask`.

Paper: Zhang et al. 2023, arXiv:2303.10512.
Source: paper; order and rounding as PEFT 0.21.
Deviates: of equal scores the first ranks are kept, exactly as many as the budget (PEFT drops all of
them).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from jlora.contracts.schedule import Schedule, Trainable
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.adalora import AdaLoRA
from jlora.schedules import ranks
from jlora.types import Dynamic, Tree


@dataclasses.dataclass(frozen=True)
class Budget:
    """When the ranks fall to how many. Raises ValueError for steps or smoothing out of range."""

    target: int  # ranks that are kept at last, of all sites together
    total: int  # T, steps of the training
    warmup: int = 0  # t_i
    final: int = 0  # t_f
    interval: int = 1  # steps between two allocations
    beta1: float = 0.85  # of the sensitivity
    beta2: float = 0.85  # of its uncertainty

    def __post_init__(self):
        if min(self.warmup, self.final) < 0 or self.interval < 1 or self.target < 1 or not (
            self.warmup + self.final < self.total
        ):  # fmt: skip
            raise ValueError(f"Budget: got {self}, expected warmup + final < total, interval >= 1 "
                             "and target >= 1")  # fmt: skip
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"Budget: got beta1 {self.beta1}, beta2 {self.beta2}, expected them "
                             "between 0 and 1")  # fmt: skip

    def at(self, step: Dynamic, start: int) -> Int[Array, ""]:
        """b(n).

        Args:
          step: n, [] int, may be traced.
          start: b_0, the ranks of all sites.

        Returns:
          int32 []: all of them up to the warm-up, the target from T - t_f on, rounded down between.
        """
        step = jnp.asarray(step, jnp.float32)
        left = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
        falling = jnp.floor((start - self.target) * left**3 + self.target).astype(jnp.int32)
        late = step > self.total - self.final
        return jnp.where(step <= self.warmup, start, jnp.where(late, self.target, falling))

    def due(self, step: Dynamic) -> Array:
        """Whether ranks are allocated at a step.

        Args:
          step: n, [] int, may be traced.

        Returns:
          bool [].
        """
        step = jnp.asarray(step, jnp.int32)
        late = step > self.total - self.final
        return (step > self.warmup) & (late | (step % self.interval == 0))


class Scores(NamedTuple):
    """State of the allocation."""

    step: Int32[Array, ""]  # the last one that was observed, -1 before the first
    sensitivity: Trainable  # like the adapter's trainable
    uncertainty: Trainable  # like it
    masks: dict[str, Array]  # path -> bool [*stack, R], of the last allocation


def start(adapter: Adapter) -> Scores:
    """The state before the first step.

    Args:
      adapter: of `jlora.methods.AdaLoRA` sites.

    Returns:
      Scores of zero, and masks that keep everything.

    Raises:
      ValueError: a site of another method.
    """
    for site, method in adapter.sites:
        if not isinstance(method, AdaLoRA):
            raise ValueError(f"{site.path}: got {method}, expected AdaLoRA")
    zero = jax.tree.map(jnp.zeros_like, adapter.trainable)
    return Scores(jnp.asarray(-1, jnp.int32), zero, zero, ranks.full(adapter))


def observe(state: Scores, adapter: Adapter, gradients: Trainable, budget: Budget) -> Scores:
    """One step: scores, and the masks where an allocation is due.

    Args:
      state: before the step.
      adapter: after the optimizer's update.
      gradients: of its trainable, those of the update.
      budget: the schedule.

    Returns:
      The state after the step.
    """
    step = state.step + 1
    size = jax.tree.map(lambda w, g: jnp.abs(w * g), adapter.trainable, gradients)
    mean = jax.tree.map(
        lambda i, x: budget.beta1 * i + (1 - budget.beta1) * x, state.sensitivity, size
    )
    spread = jax.tree.map(
        lambda u, x, i: budget.beta2 * u + (1 - budget.beta2) * jnp.abs(x - i),
        state.uncertainty, size, mean,
    )  # fmt: skip
    live = step < budget.total - budget.final
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(live, n, o), new, old)  # noqa: E731
    sensitivity, uncertainty = keep(mean, state.sensitivity), keep(spread, state.uncertainty)
    state = Scores(step, sensitivity, uncertainty, state.masks)
    masks, due = allocate(state, budget.at(step, _all(state.masks))), budget.due(step)
    return state._replace(masks={p: jnp.where(due, m, state.masks[p]) for p, m in masks.items()})


def importance(state: Scores) -> dict[str, Array]:
    """S of every rank.

    Args:
      state: the scores.

    Returns:
      {path: [*stack, R]}.
    """
    out = {}
    for path in state.sensitivity:
        s = {n: i * state.uncertainty[path][n] for n, i in state.sensitivity[path].items()}
        out[path] = s["e"] + jnp.mean(s["a"], axis=-2) + jnp.mean(s["b"], axis=-1)
    return out


def allocate(state: Scores, budget: Dynamic) -> dict[str, Array]:
    """The masks of the most important ranks.

    Args:
      state: the scores.
      budget: [] int, how many ranks are kept; may be traced.

    Returns:
      {path: bool [*stack, R]}.
    """
    scores = importance(state)
    flat = jnp.concatenate([jnp.ravel(s) for s in scores.values()])
    place = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True) < budget
    out, at = {}, 0
    for path, s in scores.items():
        out[path], at = place[at : at + s.size].reshape(s.shape), at + s.size
    return out


def mask(adapter: Adapter, masks: ranks.Masks) -> Adapter:
    """The adapter with e of dropped ranks zero.

    Args:
      adapter: of AdaLoRA sites.
      masks: which ranks are kept.

    Returns:
      An adapter of the same shapes.
    """
    return ranks.zeroed(adapter, masks, ("e",))


def step(
    state: Scores, adapter: Adapter, gradients: Trainable, budget: Budget
) -> tuple[Scores, Adapter]:
    """What follows an optimizer's update: scores, and ranks zeroed where that is due.

    Args:
      state: before the step.
      adapter: after the update.
      gradients: of its trainable.
      budget: the schedule.

    Returns:
      The state and the adapter after the step. Between two allocations dropped ranks move.
    """
    state = observe(state, adapter, gradients, budget)
    cut, due = mask(adapter, state.masks).trainable, budget.due(state.step)
    trainable = jax.tree.map(lambda c, t: jnp.where(due, c, t), cut, adapter.trainable)
    return state, adapter.replace(trainable=trainable)


def _all(masks: ranks.Masks) -> int:
    return sum(m.size for m in masks.values())


# The record: from all ranks to 3, at every step.
_BUDGET = Budget(target=3, total=5, final=1)


def _observe(state: Tree, adapter: Adapter, gradients: Trainable) -> Tree:
    return observe(state, adapter, gradients, _BUDGET)  # type: ignore[arg-type]


SYSTEM = Schedule(
    name="AdaLoRA allocation",
    paper="Zhang 2023, 2303.10512",
    symbol="observe",
    claim="adalora",
    evidence="scores, budgets and masks of PEFT's allocator, step by step",
    examples=(AdaLoRA(rank=4, alpha=2.0),),
    start=start,
    observe=_observe,
    masks=lambda state, step: state.masks,
    mask=mask,
    shrink=ranks.shrink,
    budget=lambda adapter, step: int(_BUDGET.at(max(step - 1, 0), _all(ranks.full(adapter)))),
    length=5,
)
